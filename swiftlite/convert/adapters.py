"""LoRA adapters offline: PEFT directory <-> Megatron adapter checkpoint, and merging into a base model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from swiftlite.checkpoint.chat import copy_chat
from swiftlite.checkpoint.files import main_dtype
from swiftlite.checkpoint.new_tokens import copy_tokenizer
from swiftlite.convert.execute import run_jobs, verify_bitwise
from swiftlite.convert.origin import Origin, origin_root
from swiftlite.convert.plan import copy_job
from swiftlite.convert.vocabulary import NewTokens
from swiftlite.utils.dist import barrier, get_rank, host_group
from swiftlite.utils.errors import CheckpointError, ConfigError, UsageError
from swiftlite.utils.io import blame, format_bytes, read_json, write_bytes_atomic, write_json, write_text_atomic
from swiftlite.utils.logger import get_logger, log_next
from swiftlite.utils.output import check_output
from swiftlite.weights import dcp_file, stream, torch_dist
from swiftlite.weights.dcp_file import TorchDistSource
from swiftlite.weights.journal import fingerprint, workspace
from swiftlite.weights.lora import (
    EXPERT,
    PEFT_PREFIX,
    A,
    B,
    ForeignAdapter,
    LoraConfig,
    check_adapter,
    check_values,
    describe,
    unpack_experts,
)
from swiftlite.weights.merged import TOKENS, Extras, Merged, read_extras
from swiftlite.weights.rule import BoundMap
from swiftlite.weights.safetensors import SafetensorsSource, create_shards, plan_shards, write_index
from swiftlite.weights.storage import TensorSource, TensorSpec
from swiftlite.weights.torch_dist import find_iteration

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Adapter:
    """An adapter of either format.

    names: adapter name (Hugging Face, no prefix) -> its name in `source`, in order. peft_config: what adapter_config.json
    should say of it, None where the file beside it, `config_file`, says so already. files: what it was read from.
    extras: what it holds besides.
    """

    source: TensorSource
    names: Mapping[str, str]
    config: LoraConfig
    config_file: Path
    peft_config: Mapping[str, Any] | None
    files: tuple[Path, ...]
    extras: Extras

    def write_config(self, directory: Path) -> None:
        if self.peft_config is None:
            write_bytes_atomic(directory / CONFIG, self.config_file.read_bytes())
        else:
            write_json(directory / CONFIG, self.peft_config)

    @property
    def carried(self) -> dict[str, str]:
        """As `names`, the rows of tokens among them."""
        return {**self.names, **{w.removesuffix(".weight") + TOKENS: name for w, (name, _) in self.extras.rows.items()}}

    def described(self) -> Mapping[str, Any]:
        """adapter_config.json as `write_config` writes it."""
        return self.peft_config or read_json(self.config_file)


def open_adapter(directory: Path, bound: BoundMap, scratch: Path, plain: bool = True) -> Adapter:
    """Read a PEFT directory or a Megatron adapter checkpoint and hold it against the base model.

    Args: scratch: folder for unpacking experts; must live as long as the adapter is read. plain: refuse one that holds
        more than pairs of matrices and rows of tokens.
    Raises: CheckpointError, ConfigError, MapError or ShapeError naming what does not fit.
    """
    is_peft = (directory / WEIGHTS).is_file()
    config_file = (directory if is_peft else _root(directory)) / CONFIG
    if not config_file.is_file():
        raise ConfigError(f"{config_file} is missing; it says rank and alpha of the adapter")
    config = read_json(config_file)
    with blame(config_file):
        lora, described = LoraConfig.from_dict(config), None
    source: Any
    files: tuple[Path, ...]
    if is_peft:
        source, files = SafetensorsSource(directory), (directory / WEIGHTS,)
        facts = unpack_experts(directory / WEIGHTS, bound.model, lora, scratch / WEIGHTS)
        if facts:
            source, described = SafetensorsSource(scratch), {**config, **describe(facts)}
            lora = LoraConfig.from_dict(described)
        names = {name.removeprefix(PEFT_PREFIX): name for name in source.tensors}
    else:
        iteration = find_iteration(directory)
        source, files = TorchDistSource(iteration), (iteration / ".metadata", *iteration.glob("*.distcp"))
        names = {name: name for name in source.tensors}
        if any(not name.endswith(TOKENS) and _module(name) + ".weight" not in bound.by_hf for name in names):
            source = ForeignAdapter(source, bound)
            names = source.names
            described = {**config, "target_modules": sorted({_module(n).rpartition(".")[2] for n in names})}
    extras = read_extras(names, source, config, bound)
    if plain and (extras.whole or extras.biases):
        raise ConfigError(
            f"{directory}: holds more than LoRA matrices and rows of tokens "
            f"({next(n for n in names if not n.endswith((A, B, TOKENS)))}); merge it into its base model with "
            "`swiftlite export --merge_lora true`"
        )
    held, names = names, {name: stored for name, stored in names.items() if name.endswith((A, B))}
    if not names:
        raise CheckpointError(f"{directory} holds no LoRA matrices")
    check_adapter(bound, {name: source.spec(stored).shape for name, stored in names.items()}, str(directory))
    check_values(source, held, lora, str(directory))
    return Adapter(source, names, lora, config_file, described, (*files, config_file), extras)


def _module(name: str) -> str:
    return name.removesuffix(A).removesuffix(B)


def _root(directory: Path) -> Path:
    try:
        return find_iteration(directory).parent
    except CheckpointError:
        raise CheckpointError(
            f"{directory} is no adapter: it has neither {WEIGHTS} nor a Megatron checkpoint"
        ) from None


def convert_adapter(args: Any, adapter: Adapter, output_dir: Path) -> Path:
    """Write an adapter in the other format, bit for bit, with its adapter_config.json."""
    specs = {name: adapter.source.spec(stored) for name, stored in adapter.carried.items()}
    plan = dcp_file.plan_plain(specs)
    shards = plan_shards({PEFT_PREFIX + n: s for n, s in specs.items()}, 1 << 62)
    _report("to_mcore" if args.to_mcore else "to_hf", adapter, output_dir, plan.total_bytes)
    if args.dry_run:
        return output_dir
    kind = "Megatron adapter" if args.to_mcore else "PEFT adapter"
    inputs = [adapter.config_file.parent, *adapter.files]
    check = partial(check_output, output_dir, kind, args.exist_ok, inputs, needed=plan.total_bytes)
    check()

    def prepare(directory: Path) -> None:
        if args.to_mcore:
            (directory / "iter_0000001").mkdir()
            dcp_file.create_files(directory / "iter_0000001", plan)
        else:
            create_shards(directory, shards)
            (directory / shards[0].file).rename(directory / WEIGHTS)

    def identity() -> str:
        return fingerprint(adapter.files, ["adapter", args.to_mcore])

    def place(directory: Path, name: str) -> tuple[Path, int]:
        if args.to_mcore:
            file, offset = plan.data[name, None]
            return directory / "iter_0000001" / file, offset
        return directory / WEIGHTS, shards[0].offsets[PEFT_PREFIX + name]

    with host_group(), workspace(output_dir, check, kind, identity, prepare) as space:
        jobs = [
            copy_job(adapter.source, stored, *place(space.directory, name), specs[name].dtype)
            for name, stored in adapter.carried.items()
        ]
        hashes = run_jobs("adapter", jobs, args.max_memory_bytes, space)
        if get_rank() == 0:
            adapter.write_config(space.directory)
            copy_chat(adapter.config_file.parent, space.directory)
            args.save(space.directory)
            if args.to_mcore:
                dcp_file.write_metadata(space.directory / "iter_0000001", plan, {}, iteration=1)
                write_text_atomic(space.directory / torch_dist.TRACKER, "1")
        barrier()
        if args.verify == "bitwise":
            prefix = "" if args.to_mcore else PEFT_PREFIX
            stored = {prefix + name: stored for name, stored in adapter.carried.items()}
            written = (
                TorchDistSource(space.directory / "iter_0000001")
                if args.to_mcore
                else SafetensorsSource(space.directory)
            )
            verify_bitwise(written, hashes, jobs, args.max_memory_bytes, stored)
    modules = {_module(name) for name in adapter.names}
    experts = {module for module in modules if EXPERT.search(module)}
    if not args.to_mcore and experts and any(m.endswith(MLP) for m in modules - experts):
        get_logger().warning(
            "the adapter has experts and other MLPs; peft on transformers 5 (seen with peft 0.21) leaves out the others "
            "without a word: merge it with --merge_lora true to use all of it there"
        )
    get_logger().info("wrote %s", output_dir)
    return output_dir


def write_peft(iteration: Path, config: Mapping[str, Any], directory: Path, origin: Origin) -> None:
    """Write the adapter in a Megatron checkpoint as PEFT has it. Nothing else may be writing there.

    origin: what the adapter was trained on; its new tokens' texts come along.
    """
    source = TorchDistSource(iteration)
    specs = {PEFT_PREFIX + name: source.spec(name) for name in sorted(source.tensors)}
    shards = plan_shards(specs, 1 << 62)
    create_shards(directory, shards)
    (directory / shards[0].file).rename(directory / WEIGHTS)
    places = shards[0].offsets
    stream.run(
        [copy_job(source, n.removeprefix(PEFT_PREFIX), directory / WEIGHTS, places[n], specs[n].dtype) for n in specs]
    )
    write_json(directory / CONFIG, config)
    if origin.new_tokens is not None:
        copy_tokenizer(origin.root, directory, origin.new_tokens.ids)


def merge_to_hf(
    base_dir: Path,
    adapter: Adapter,
    output_dir: Path,
    dtype: torch.dtype | None,
    new_tokens: NewTokens | None = None,
    *,
    record: Callable[[Path], Any],
    next_words: Sequence[str] | None = None,
    max_shard_bytes: int = 5 * 10**9,
    max_memory: int | None = None,
    verify: bool = False,
    exist_ok: bool = False,
    dry_run: bool = False,
    allow_overflow: bool = False,
) -> Path:
    """Write a base model of either format with the adapter added, as a Hugging Face directory. Collective.

    Args: dtype: of the result; None: that of each weight of the base. record: writes args.json into a directory.
        next_words: further flags of the command to suggest. verify: read everything back.
    """
    origin = Origin(base_dir, new_tokens)
    merged = Merged(origin.source, adapter.source, adapter.names, adapter.config, adapter.extras)
    specs = {}
    for name in origin.names:
        entry, position = origin.bound.by_hf[origin.copies.get(name, name)]
        target = None if entry.rule.keep_dtype else dtype
        specs[name] = TensorSpec(target or origin.dtypes[name], entry.hf_shapes[position])
    total = sum(s.nbytes for s in specs.values())
    shards = plan_shards(specs, max_shard_bytes)
    _report(f"merge into {base_dir}", adapter, output_dir, total)
    if dry_run:
        return output_dir
    kind, inputs = "Hugging Face model", [base_dir, adapter.config_file.parent, *adapter.files]
    check = partial(check_output, output_dir, kind, exist_ok, inputs, needed=total)
    check()
    root = origin_root(base_dir)
    sources = sorted(base_dir.glob("*.safetensors")) or sorted(find_iteration(base_dir).glob("*.distcp"))

    def identity() -> str:
        files = [*sources, root / "config.json", *adapter.files]
        return fingerprint(files, ["merge", str(dtype), origin.changes, [[s.file, s.size] for s in shards]])

    def prepare(directory: Path) -> None:
        create_shards(directory, shards)

    with host_group(), workspace(output_dir, check, kind, identity, prepare) as space:
        places = {n: (space.directory / s.file, offset) for s in shards for n, offset in s.offsets.items()}
        jobs = [copy_job(merged, origin.copies.get(n, n), *places[n], specs[n].dtype) for n in specs]
        hashes = run_jobs("merge", jobs, max_memory, space, allow_overflow)
        if get_rank() == 0:
            origin.write_side_files(space.directory, main_dtype((s.dtype, s.numel) for s in specs.values()))
            copy_chat(adapter.config_file.parent, space.directory)
            record(space.directory)
            write_index(space.directory, shards, total)
        barrier()
        if verify:
            verify_bitwise(SafetensorsSource(space.directory), hashes, jobs, max_memory)
    get_logger().info("wrote %s (%s)", output_dir, format_bytes(total))
    if next_words is not None:
        log_next("swiftlite", "infer", "--model", output_dir, *next_words)
    return output_dir


def _report(what: str, adapter: Adapter, target: Path, total: int) -> None:
    ranks = sorted({adapter.source.spec(stored).shape[0] for name, stored in adapter.names.items() if name.endswith(A)})
    get_logger().info(
        "%s: %s -> %s; %d modules of rank %s, output %s", what, adapter.config_file.parent, target,
        len(adapter.names) // 2, ", ".join(map(str, ranks)), format_bytes(total),
    )  # fmt: skip


def the_adapter(args: Any) -> Path:
    """The one adapter that the arguments name. Raises: UsageError if there are several."""
    given = [*args.adapters, *([args.mcore_adapter] if args.mcore_adapter else [])]
    if len(given) > 1:
        raise UsageError(f"{' '.join(given)}: one adapter at a time")
    return Path(given[0])
