"""Offline conversion both ways: read headers, check, plan, stream, verify, rename into place.

No model, GPU or process group is involved, and neither megatron-core nor transformers is imported (unless the precision
check is asked for).
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from swiftlite.llm.argument.export import ExportArguments
from swiftlite.llm.pipeline import as_arguments, resolve
from swiftlite.megatron.argument.export import conversion_arguments
from swiftlite.megatron.model.hf_config import bind_map, convert_hf_config
from swiftlite.utils.errors import CheckpointError, ConfigError, UsageError
from swiftlite.utils.io import check_disk, format_bytes, new_directory, peak_memory_bytes, write_json
from swiftlite.utils.logger import get_logger
from swiftlite.weights import stream, torch_dist
from swiftlite.weights.ops import Segment
from swiftlite.weights.rule import BoundMap, Coverage, Duplicate, Entry
from swiftlite.weights.safetensors import SafetensorsSource, create_shards, plan_shards, write_index
from swiftlite.weights.storage import Extent, Files, TensorSource, TensorSpec
from swiftlite.weights.torch_dist import DistPlan, HfNames, McoreView, TorchDistSource, find_iteration, plan_torch_dist

MANIFEST = "manifest.json"
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".distcp")
NOT_COPIED = {"args.json", MANIFEST, "model.safetensors.index.json", "megatron_lm_args.txt", torch_dist.TRACKER}


def read_manifest(directory: Path) -> dict[str, Any] | None:
    """manifest.json of a checkpoint that swiftlite converted, None for others."""
    path = directory / MANIFEST
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def read_config(directory: Path) -> dict[str, Any]:
    """config.json of a model directory. Raises: ConfigError if it is absent or no JSON object."""
    path = directory / "config.json"
    if not path.is_file():
        raise ConfigError(f"{path} is missing; give the model's own directory or id with --model")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON ({error})") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{path} holds no JSON object")
    return config


def check_quantisation(config: Mapping[str, Any]) -> None:
    """Raises: ConfigError for quantised weights that cannot be read."""
    method = (config.get("quantization_config") or {}).get("quant_method")
    if method:
        raise ConfigError(f"the weights are quantised ({method}), which cannot be converted; use the unquantised model")


# ---- Hugging Face -> Megatron ----


@dataclass(frozen=True)
class ToMcorePlan:
    """Everything about a conversion before the first weight is read."""

    source: SafetensorsSource
    bound: BoundMap
    coverage: Coverage
    dist: DistPlan
    dtypes: Mapping[tuple[str, int | None], torch.dtype]

    def jobs(self, directory: Path) -> list[stream.Job]:
        """In the order of the source files, so that reading is sequential."""
        tensors = self.source.tensors
        jobs = []
        for entry in self.bound.entries:
            file, offset = self.dist.data[entry.mcore, entry.expert]
            jobs.append(
                stream.Job(
                    entry.label, entry.segments, entry.row_size, _locate(self.source, entry.hf),
                    tuple(tensors[n].spec.dtype for n in entry.hf), self.dtypes[entry.mcore, entry.expert],
                    directory / file, offset,
                )
            )  # fmt: skip
        first = {entry.label: tensors[entry.hf[0]] for entry in self.bound.entries}
        return sorted(jobs, key=lambda job: (first[job.name].file.name, first[job.name].offset))


def plan_to_mcore(
    model_dir: Path, config: Mapping[str, Any], dtype: torch.dtype | None = None, num_files: int | None = None
) -> ToMcorePlan:
    """Read headers, hold them against config.json and lay out the checkpoint.

    Args: dtype: converts to this while streaming; None keeps what is stored. num_files: default, see default_num_files.
    Raises: CheckpointError, MapError, ShapeError or ConfigError naming the first thing that is wrong.
    """
    check_quantisation(config)
    source = SafetensorsSource(model_dir)
    bound = bind_map(config, source.tensors)
    coverage = bound.check({name: t.spec.shape for name, t in source.tensors.items()}, str(model_dir))
    dtypes = {(e.mcore, e.expert): _target_dtype(source, e, dtype) for e in bound.entries}
    specs = [(e, dtypes[e.mcore, e.expert]) for e in bound.entries]
    total = sum(TensorSpec(d, e.shape).nbytes for e, d in specs)
    dist = plan_torch_dist(specs, num_files or default_num_files(total))
    return ToMcorePlan(source, bound, coverage, dist, dtypes)


def default_num_files(total_bytes: int) -> int:
    """About 10 GB each and at least 2, as ms-swift's thread_count."""
    return max(-(-(total_bytes // 10**9) // 10), 2)


def _target_dtype(source: SafetensorsSource, entry: Entry, dtype: torch.dtype | None) -> torch.dtype:
    stored = {source.tensors[name].spec.dtype for name in entry.hf}
    if dtype is not None and not entry.rule.keep_dtype:
        return dtype
    if len(stored) > 1:
        raise CheckpointError(
            f"{' and '.join(entry.hf)} have different dtypes, but Megatron keeps them in one tensor; "
            "convert to one dtype with --torch_dtype bfloat16"
        )
    return stored.pop()


def _locate(source: TensorSource, names: Sequence[str]) -> stream.Locate:
    def locate(index: int, start: int, stop: int) -> Iterator[Extent]:
        return source.extents(names[index], start, stop)

    return locate


def convert_hf2mcore(args: Any) -> Path:
    """Convert the Hugging Face checkpoint `args.model` to a torch_dist checkpoint. Returns: the output directory.

    args: ExportArguments, or words as typed. The output appears under its name only when everything, including
    the precision check if asked for, has succeeded.
    """
    started = time.time()
    args = _ready(args)
    model_dir = Path(args.model_info.model_dir)
    config = read_config(model_dir)
    dtype = args.dtype if "torch_dtype" in args.given else None
    plan = plan_to_mcore(model_dir, config, dtype, args.thread_count)
    output_dir = Path(args.output_dir or default_output_dir(args.model, "mcore"))
    _report_plan(
        "to_mcore", model_dir, output_dir, plan.bound, plan.coverage, plan.dist.total_bytes, len(plan.dist.sizes)
    )
    if args.dry_run:
        print_coverage(plan.bound, plan.coverage, plan.dtypes)
        return output_dir
    check_disk(output_dir, plan.dist.total_bytes)
    main_dtype = dtype or args.model_info.torch_dtype
    megatron = conversion_arguments(convert_hf_config(config), str(output_dir), main_dtype, args)
    with new_directory(output_dir, args.exist_ok) as directory:
        iteration = directory / "iter_0000001"
        iteration.mkdir()
        torch_dist.create_files(iteration, plan.dist)
        check_duplicates(plan.source, plan.coverage.duplicates)
        _run("to_mcore", plan.jobs(iteration), args.max_memory_bytes)
        copy_side_files(model_dir, directory, {"torch_dtype": dtype} if dtype else {})
        write_manifest(directory, plan.source, plan.coverage)
        lm_args = megatron.megatron_lm_args()
        (directory / "megatron_lm_args.txt").write_text(lm_args if isinstance(lm_args, str) else _join(lm_args))
        torch_dist.write_metadata(iteration, plan.dist, megatron.checkpoint_args(), iteration=1)
        args.save(directory)
        (directory / torch_dist.TRACKER).write_text("1")
        if args.test_convert_precision:
            _check_precision(args, model_dir, directory)
    _summary(
        output_dir, plan.dist.total_bytes, started, f"swiftlite megatron sft --mcore_model {output_dir} --dataset FILE"
    )
    return output_dir


# ---- Megatron -> Hugging Face ----


@dataclass(frozen=True)
class ToHfPlan:
    """Everything about a conversion back before the first weight is read. `specs`: output tensors in file order."""

    view: McoreView
    specs: Mapping[str, TensorSpec]
    copies: Mapping[str, str]
    layout: Mapping[str, str] | None

    @property
    def total_bytes(self) -> int:
        return sum(spec.nbytes for spec in self.specs.values())

    def jobs(self, places: Mapping[str, tuple[Path, int]]) -> list[stream.Job]:
        """places: tensor -> (file, offset of its data). In the order of the source, so that reading is sequential."""
        source = HfNames(self.view)
        keyed = []
        for name, spec in self.specs.items():
            origin = self.copies.get(name, name)
            job = copy_job(source, origin, *places[name], spec.dtype)
            first = next(source.extents(origin, 0, min(spec.nbytes, 1)), None)
            keyed.append(((first.file.name, first.offset) if first else ("", 0), job))
        return [job for _, job in sorted(keyed, key=lambda item: item[0])]


def copy_job(source: TensorSource, name: str, file: Path, offset: int, dtype: torch.dtype) -> stream.Job:
    """Copy one tensor as it is, but for its dtype."""
    spec = source.spec(name)
    rows = (Segment(0, 0, spec.numel),)
    return stream.Job(name, rows, 1, _locate(source, (name,)), (spec.dtype,), dtype, file, offset)


def plan_to_hf(
    iteration: Path,
    config: Mapping[str, Any],
    dtype: torch.dtype | None = None,
    manifest: Mapping[str, Any] | None = None,
) -> ToHfPlan:
    """Read metadata, hold it against config.json and decide names, dtypes and order of the output.

    Args: dtype: converts to this while streaming; None keeps what the checkpoint holds. manifest: of the checkpoint
        that this one was made from; gives order, files, stored copies and dtypes of tensors that have their own.
    """
    source = TorchDistSource(iteration)
    bound = bind_map(config, source.tensors)
    view = McoreView.open(source, bound)
    original = (manifest or {}).get("tensors", {})
    copies = {d.name: resolve_copy(d, bound) for d in bound.duplicates if d.name in original}
    names = [n for n in original if n in bound.by_hf or n in copies]
    if set(names) != set(bound.by_hf) | set(copies):
        names = [*bound.by_hf, *copies]
    specs = {}
    for name in names:
        entry, position = bound.by_hf[copies.get(name, name)]
        stored = view.spec(entry).dtype
        if entry.rule.keep_dtype:
            target = getattr(torch, original[name]["dtype"]) if name in original else stored
        else:
            target = dtype or stored
        specs[name] = TensorSpec(target, entry.hf_shapes[position])
    layout = {name: original[name]["file"] for name in names} if set(names) <= set(original) else None
    return ToHfPlan(view, specs, copies, layout)


def resolve_copy(duplicate: Duplicate, bound: BoundMap) -> str:
    """The tensor that holds the bytes of a stored copy; a tied model's head is its embedding."""
    return duplicate.of if duplicate.of in bound.by_hf else "model.embed_tokens.weight"


def convert_mcore2hf(args: Any) -> Path:
    """Convert the torch_dist checkpoint `args.mcore_model` to a Hugging Face directory. Returns: the output directory.

    config.json, tokenizer and manifest come from the checkpoint's own directory, or from --model for checkpoints that
    Megatron-LM or another tool wrote.
    """
    started = time.time()
    args = _ready(args)
    root = Path(args.mcore_model)
    iteration = find_iteration(root)
    root = iteration.parent
    model_dir = Path(args.model_info.model_dir) if args.model else root
    config = read_config(model_dir)
    dtype = args.dtype if "torch_dtype" in args.given else None
    plan = plan_to_hf(iteration, config, dtype, read_manifest(root))
    layout = None if "max_shard_size" in args.given else plan.layout
    shards = plan_shards(plan.specs, args.max_shard_bytes, layout)
    output_dir = Path(args.output_dir or default_output_dir(root, "hf"))
    _report_plan("to_hf", iteration, output_dir, plan.view.bound, None, plan.total_bytes, len(shards))
    if args.dry_run:
        return output_dir
    check_disk(output_dir, plan.total_bytes)
    with new_directory(output_dir, args.exist_ok) as directory:
        create_shards(directory, shards)
        places = {name: (directory / shard.file, offset) for shard in shards for name, offset in shard.offsets.items()}
        _run("to_hf", plan.jobs(places), args.max_memory_bytes)
        copy_side_files(model_dir, directory, {"torch_dtype": dtype} if dtype else {})
        write_index(directory, shards, plan.total_bytes)
        if args.test_convert_precision:
            _check_precision(args, directory, iteration)
    _summary(output_dir, plan.total_bytes, started, f"swiftlite infer --model {output_dir}")
    return output_dir


# ---- shared ----


def check_duplicates(source: SafetensorsSource, duplicates: Iterable[Duplicate]) -> None:
    """Raises: CheckpointError if a stored copy differs from its original; Megatron can hold only one of them."""
    with Files() as files:
        for duplicate in duplicates:
            of = duplicate.of if duplicate.of in source.tensors else "model.embed_tokens.weight"
            size = source.spec(of).nbytes
            if source.spec(duplicate.name) == source.spec(of):
                for start in range(0, size, stream.BLOCK_BYTES):
                    stop = min(start + stream.BLOCK_BYTES, size)
                    if _read(source, duplicate.name, start, stop, files) != _read(source, of, start, stop, files):
                        break
                else:
                    continue
            raise CheckpointError(
                f"{duplicate.name} is stored but differs from {of}, though config.json makes them one; "
                "set tie_word_embeddings to false if the model has a head of its own"
            )


def _read(source: SafetensorsSource, name: str, start: int, stop: int, files: Files) -> bytearray:
    data = bytearray(stop - start)
    position = 0
    for extent in source.extents(name, start, stop):
        files.read_into(extent, memoryview(data)[position : position + extent.size])
        position += extent.size
    return data


def write_manifest(directory: Path, source: SafetensorsSource, coverage: Coverage) -> None:
    """Record names, order, dtypes, shapes and files of the source, so that the way back restores them."""
    tensors = {
        name: {"dtype": str(t.spec.dtype).removeprefix("torch."), "shape": list(t.spec.shape), "file": t.file.name}
        for name, t in source.tensors.items()
        if name not in coverage.ignored
    }
    write_json(directory / MANIFEST, {"ignored": list(coverage.ignored), "tensors": tensors})


def copy_side_files(source: Path, target: Path, changes: Mapping[str, Any]) -> None:
    """Copy config, tokenizer and code files, never executing any; change only the named keys of config.json."""
    for path in sorted(source.iterdir()):
        if path.is_file() and path.suffix not in WEIGHT_SUFFIXES and path.name not in NOT_COPIED:
            if not path.name.startswith("."):
                shutil.copyfile(path, target / path.name)
    if changes:
        update_config(target / "config.json", changes)


def update_config(path: Path, changes: Mapping[str, Any]) -> None:
    """Change keys of a config.json; everything else keeps its text order."""
    config = json.loads(path.read_text(encoding="utf-8"))
    for key, value in changes.items():
        if isinstance(value, torch.dtype):
            value = str(value).removeprefix("torch.")
            key = "dtype" if "dtype" in config and "torch_dtype" not in config else "torch_dtype"
        config[key] = value
    write_json(path, config)


def default_output_dir(model: str | Path, suffix: str) -> str:
    """`<name>-mcore` or `<name>-hf` in the working directory."""
    name = str(model).rstrip("/").rsplit("/", 1)[-1]
    return f"{name.removesuffix('-mcore') if suffix == 'hf' else name}-{suffix}"


def _report_plan(
    what: str, source: Path, target: Path, bound: BoundMap, coverage: Coverage | None, total: int, files: int
) -> None:
    log = get_logger()
    log.info("%s: %s -> %s", what, source, target)
    log.info(
        "%d tensors, %s in %d files; peak memory of the copy about %s", len(bound.by_hf), format_bytes(total), files,
        format_bytes(3 * stream.BLOCK_BYTES * stream.WORKERS),
    )  # fmt: skip
    if coverage and coverage.ignored:
        log.info("ignored: %s", ", ".join(coverage.ignored[:5]) + (" ..." if len(coverage.ignored) > 5 else ""))
    for duplicate in coverage.duplicates if coverage else ():
        log.info("%s is a copy of %s: checked, kept once, written again on the way back", duplicate.name, duplicate.of)


def print_coverage(bound: BoundMap, coverage: Coverage, dtypes: Mapping[tuple[str, int | None], torch.dtype]) -> None:
    """Print the plan per rule: Megatron name <- HF names, shape, dtype, bytes; then what is left out and why."""
    for entry in bound.entries:
        dtype = dtypes[entry.mcore, entry.expert]
        spec = TensorSpec(dtype, entry.shape)
        print(
            f"{entry.label} <- {' + '.join(entry.hf)} {type(entry.rule.op).__name__} "
            f"{list(entry.shape)} {str(dtype).removeprefix('torch.')} {format_bytes(spec.nbytes)}"
        )
    for name in coverage.ignored:
        print(f"ignored: {name} (derived, not a weight)")
    for duplicate in coverage.duplicates:
        print(f"left out: {duplicate.name} (copy of {duplicate.of})")


@contextmanager
def _progress(what: str, total: int) -> Iterator[Any]:
    from tqdm import tqdm

    with tqdm(total=total, unit="B", unit_scale=True, desc=what, mininterval=0.5) as bar:
        yield bar


def _run(what: str, jobs: list[stream.Job], max_memory: int | None) -> None:
    with _progress(what, sum(job.nbytes for job in jobs)) as bar:
        stream.run(jobs, max_memory=max_memory, on_bytes=bar.update)


def _check_precision(args: Any, hf_dir: Path, mcore_dir: Path) -> None:
    from swiftlite.megatron.verify import check_precision

    check_precision(hf_dir, mcore_dir, args)


def _summary(output_dir: Path, total: int, started: float, next_command: str) -> None:
    seconds = time.time() - started
    get_logger().info(
        "wrote %s (%s) in %.1f s, %s/s, peak memory %s", output_dir, format_bytes(total), seconds,
        format_bytes(total / max(seconds, 1e-9)), format_bytes(peak_memory_bytes()),
    )  # fmt: skip
    get_logger().info("next: %s", next_command)


def _join(argv: Sequence[str]) -> str:
    import shlex

    return " ".join(shlex.quote(a) for a in argv) + "\n"


def _ready(args: Any) -> Any:
    """ExportArguments with the model's facts, from such an object or from words as typed."""
    args = as_arguments(ExportArguments, args)
    if not hasattr(args, "model_info"):
        resolve(args, need_template=args.test_convert_precision)
    return args


def export_main(args: Any) -> Path:
    """`swiftlite export`; `args`: ExportArguments, or words as typed. Raises: UsageError if no direction is given."""
    args = as_arguments(ExportArguments, args)
    if args.to_mcore:
        return convert_hf2mcore(args)
    if args.to_hf:
        return convert_mcore2hf(args)
    raise UsageError("nothing to do: give --to_mcore true or --to_hf true")
