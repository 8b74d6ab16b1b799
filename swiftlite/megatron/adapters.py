"""LoRA adapters offline: PEFT directory <-> Megatron adapter checkpoint, and merging into a base model."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swiftlite.megatron.model.hf_config import bind_map
from swiftlite.megatron.origin import Origin
from swiftlite.megatron.plan import copy_job
from swiftlite.megatron.side_files import copy_side_files, read_config
from swiftlite.utils.errors import CheckpointError, ConfigError, UsageError
from swiftlite.utils.io import check_new, format_bytes, write_json
from swiftlite.utils.logger import get_logger
from swiftlite.weights import stream, torch_dist
from swiftlite.weights.journal import fingerprint, workspace
from swiftlite.weights.lora import PEFT_PREFIX, A, B, ForeignAdapter, LoraConfig, Merged, check_adapter
from swiftlite.weights.rule import BoundMap
from swiftlite.weights.safetensors import SafetensorsSource, create_shards, plan_shards, write_index
from swiftlite.weights.storage import TensorSource, TensorSpec
from swiftlite.weights.torch_dist import TorchDistSource, find_iteration

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class Adapter:
    """An adapter of either format. names: adapter name (Hugging Face, no prefix) -> its name in `source`, in order."""

    directory: Path
    source: TensorSource
    names: Mapping[str, str]
    config: LoraConfig
    files: tuple[Path, ...]


def open_adapter(directory: Path, bound: BoundMap, scratch: Path) -> Adapter:
    """Read a PEFT directory or a Megatron adapter checkpoint and hold it against the base model.

    Args: scratch: folder for unpacking; must live as long as the adapter is read.
    Raises: CheckpointError, ConfigError, MapError or ShapeError naming what does not fit.
    """
    path = directory / WEIGHTS
    root = directory if path.is_file() else _root(directory)
    if not (root / CONFIG).is_file():
        raise ConfigError(f"{root / CONFIG} is missing; it says rank and alpha of the adapter")
    if path.is_file() and unpack_experts(directory, bound, scratch):
        directory = root = scratch
    config = LoraConfig.from_dict(json.loads((root / CONFIG).read_text(encoding="utf-8")))
    source: Any
    if path.is_file():
        source = SafetensorsSource(directory)
        names = {name.removeprefix(PEFT_PREFIX): name for name in source.tensors}
        files = tuple(source.files)
    else:
        iteration = find_iteration(directory)
        dist = TorchDistSource(iteration)
        files = (iteration / ".metadata", *iteration.glob("*.distcp"))
        if all(
            name.removesuffix(".weight").rpartition(".lora_")[0] + ".weight" in bound.by_hf for name in dist.tensors
        ):
            source, names = dist, {name: name for name in dist.tensors}
        else:
            source = ForeignAdapter(dist, bound)
            names = source.names
    check_adapter(bound, {name: source.spec(stored).shape for name, stored in names.items()}, str(directory))
    return Adapter(root, source, names, config, (*files, root / CONFIG))


def unpack_experts(directory: Path, bound: BoundMap, target: Path) -> bool:
    """Write an adapter whose experts are packed, as peft does on transformers 5, with one pair per expert and projection.

    Packed: A [E r, in] and B [out, r E] on `experts` hold what A [r, in] and B [out, r] are for each of E experts, the
    expert being the slowest index of A's rows and the fastest of B's columns; gate and up share one pair of their rank.
    Returns: False if nothing is packed, and nothing is written.
    """
    from safetensors.torch import load_file, save_file

    model, tensors = bound.model, load_file(directory / WEIGHTS)
    packed = [n for n in tensors if n.endswith((f".experts{A}", f".experts.base_layer{A}"))]
    if not packed:
        return False
    config = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
    lora = LoraConfig.from_dict(config)
    alphas, ranks = dict(config.get("alpha_pattern") or {}), dict(config.get("rank_pattern") or {})
    for name in packed:
        a, b = tensors.pop(name), tensors.pop(name.removesuffix(A) + B)
        experts = name.removesuffix(A).removesuffix(".base_layer")
        rank = a.shape[0] // model.experts
        fused = (a.shape[1], b.shape[0]) == (model.hidden, 2 * model.moe_ffn)
        parts = ("gate_proj", "up_proj") if fused else ("down_proj",)
        whole = f"{experts.removeprefix(PEFT_PREFIX)}.{'gate_up_proj' if fused else 'down_proj'}"
        a, b = a.view(model.experts, rank, -1), b.view(b.shape[0], rank, model.experts)
        for expert in range(model.experts):
            for part, rows in zip(parts, b[:, :, expert].chunk(len(parts)), strict=True):
                tensors[f"{experts}.{expert}.{part}{A}"] = a[expert].clone()
                tensors[f"{experts}.{expert}.{part}{B}"] = rows.clone()
        for part in parts:
            pattern = rf".*\.experts\.\d+\.{part}"
            ranks[pattern] = rank
            alphas[pattern] = lora.scale(whole, rank) * (math.sqrt(rank) if lora.use_rslora else rank)
    config.update(alpha_pattern=alphas, rank_pattern=ranks, target_parameters=None)
    config["target_modules"] = sorted({*(config.get("target_modules") or ()), "gate_proj", "up_proj", "down_proj"})
    save_file(tensors, target / WEIGHTS, {"format": "pt"})
    write_json(target / CONFIG, config)
    return True


def _root(directory: Path) -> Path:
    try:
        return find_iteration(directory).parent
    except CheckpointError:
        raise CheckpointError(
            f"{directory} is no adapter: it has neither {WEIGHTS} nor a Megatron checkpoint"
        ) from None


def convert_adapter(adapter: Adapter, output_dir: Path, to_mcore: bool, exist_ok: bool) -> Path:
    """Write an adapter in the other format, bit for bit, with its adapter_config.json."""
    specs = {name: adapter.source.spec(stored) for name, stored in adapter.names.items()}
    plan = torch_dist.plan_plain(specs)
    shards = plan_shards({PEFT_PREFIX + n: s for n, s in specs.items()}, 1 << 62)
    check_new(output_dir, exist_ok)

    def prepare(directory: Path) -> None:
        if to_mcore:
            (directory / "iter_0000001").mkdir()
            torch_dist.create_files(directory / "iter_0000001", plan)
        else:
            create_shards(directory, shards)

    def identity() -> str:
        return fingerprint(adapter.files, ["adapter", to_mcore])

    with workspace(output_dir, exist_ok, identity, prepare) as space:
        iteration = space.directory / "iter_0000001"
        jobs = []
        for name, stored in adapter.names.items():
            if to_mcore:
                file, offset = plan.data[name, None]
                place = (iteration / file, offset)
            else:
                place = (space.directory / shards[0].file, shards[0].offsets[PEFT_PREFIX + name])
            jobs.append(copy_job(adapter.source, stored, *place, specs[name].dtype))
        stream.run(jobs, journal=space.journal)
        shutil.copyfile(adapter.directory / CONFIG, space.directory / CONFIG)
        if to_mcore:
            torch_dist.write_metadata(iteration, plan, {}, iteration=1)
            (space.directory / torch_dist.TRACKER).write_text("1")
        else:
            (space.directory / shards[0].file).rename(space.directory / WEIGHTS)
    get_logger().info("wrote %s: %d matrices, %s", output_dir, len(specs), format_bytes(plan.total_bytes))
    return output_dir


def merge_to_hf(args: Any, base_dir: Path, adapter_dir: Path, output_dir: Path, scratch: Path) -> Path:
    """Write a base model of either format with the adapter added, as a Hugging Face directory."""
    origin = Origin(base_dir)
    adapter = open_adapter(adapter_dir, origin.bound, scratch)
    merged = Merged(origin.source, adapter.source, adapter.names, adapter.config)
    dtype = args.dtype if "torch_dtype" in args.given else None
    specs = {}
    for name in origin.names:
        entry, position = origin.bound.by_hf[origin.copies.get(name, name)]
        target = None if entry.rule.keep_dtype else dtype
        specs[name] = TensorSpec(target or origin.dtypes[name], entry.hf_shapes[position])
    shards = plan_shards(specs, args.max_shard_bytes)
    check_new(output_dir, args.exist_ok)
    sources = [base_dir] if base_dir.is_file() else _weight_files(base_dir)

    def identity() -> str:
        return fingerprint([*sources, *adapter.files], ["merge", str(dtype), [[s.file, s.size] for s in shards]])

    with workspace(output_dir, args.exist_ok, identity, lambda d: create_shards(d, shards)) as space:
        places = {n: (space.directory / s.file, offset) for s in shards for n, offset in s.offsets.items()}
        jobs = [copy_job(merged, origin.copies.get(n, n), *places[n], specs[n].dtype) for n in specs]
        stream.run(jobs, max_memory=args.max_memory_bytes, journal=space.journal)
        root = base_dir if (base_dir / "config.json").is_file() else find_iteration(base_dir).parent
        copy_side_files(root, space.directory, {"torch_dtype": dtype} if dtype else {})
        write_index(space.directory, shards, sum(s.nbytes for s in specs.values()))
    get_logger().info("wrote %s with %d merged modules; next: swiftlite infer --model %s", output_dir,
                      len(adapter.names) // 2, output_dir)  # fmt: skip
    return output_dir


def _weight_files(directory: Path) -> Iterable[Path]:
    found = sorted(directory.glob("*.safetensors"))
    return found or sorted(find_iteration(directory).glob("*.distcp"))


def base_map(args: Any) -> BoundMap:
    """The weight map of the adapter's base model, from --model or --mcore_model; only config.json is read."""
    return bind_map(read_config(Path(args.model_info.model_dir)), ["mtp."])


def the_adapter(args: Any) -> Path:
    """The one adapter that the arguments name. Raises: UsageError if there are several."""
    if len(args.adapters) > 1:
        raise UsageError(f"--adapters {' '.join(args.adapters)}: one adapter at a time")
    return Path(args.adapters[0] if args.adapters else args.mcore_adapter)
