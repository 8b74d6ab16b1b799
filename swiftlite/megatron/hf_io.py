"""Live models and Hugging Face files: each rank reads and writes exactly its own slices, through the weight map."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from swiftlite.checkpoint.checkpoint import Checkpoint
from swiftlite.convert.hf import HfPlan, copy_job
from swiftlite.megatron.background import Write
from swiftlite.megatron.shards import LiveMap, iter_shards
from swiftlite.utils.dist import all_gather, barrier, get_rank, get_world_size
from swiftlite.utils.io import format_bytes, replace_directory
from swiftlite.utils.logger import get_logger
from swiftlite.weights import stream
from swiftlite.weights.fp8 import FP8
from swiftlite.weights.fused import FusedTensor
from swiftlite.weights.joined import Joined
from swiftlite.weights.rule import Entry
from swiftlite.weights.safetensors import SafetensorsSource, create_shards, plan_shards
from swiftlite.weights.shard import read_shard, write_shard
from swiftlite.weights.storage import Files, TensorSpec, check_overflow, overflows


def load_weights(
    models: Sequence[torch.nn.Module], origin: str | Path | Checkpoint, allow_overflow: bool = False
) -> int:
    """Fill live models from a Hugging Face directory or a torch_dist checkpoint. Returns: bytes read by this rank.

    Collective. allow_overflow: only warn of finite values that the model's dtype makes infinite.

    Writes with `copy_` into the live tensors: call it after Float16Module and DDP wrapping, so that fp32 buffers stay
    fp32, and let the optimizer reload its main parameters afterwards.
    Raises: CheckpointError, MapError, ShapeError before anything is changed if files and config do not match.
    """
    origin = origin if isinstance(origin, Checkpoint) else Checkpoint.open(origin)
    live, read = LiveMap(origin.bound), 0
    overflowed: dict[str, torch.dtype] = {}
    with Files() as files, torch.no_grad():
        for shard in iter_shards(models):
            entry, offset = live.entry(shard)
            stored = origin.source.spec(entry.hf[0]).dtype
            dtype = torch.float32 if stored in FP8 else stored
            data = read_shard(origin.source, entry, offset, shard.local_shape, files, dtype)
            target = shard.data.view(shard.local_shape)
            target.copy_(data)
            if overflows(data, target.cpu() if torch.finfo(target.dtype).max < torch.finfo(dtype).max else target):
                overflowed.update(dict.fromkeys(entry.hf, target.dtype))
            read += data.nbytes
    found = {name: dtype for part in all_gather(overflowed) for name, dtype in part.items()}
    check_overflow(found, next(iter(found.values()), torch.float32), allow_overflow)
    get_logger().info("loaded %s from %s on this rank", format_bytes(read), origin.root)
    return read


def save_hf_weights(
    models: Sequence[torch.nn.Module], output_dir: str | Path, origin_dir: str | Path, max_shard_bytes: int = 5 * 10**9
) -> list[str]:
    """Write live models as a Hugging Face directory; the ranks write slices in place. Collective.

    The directory takes its name when it is whole.
    Args: origin_dir: the checkpoint that the run started from. config.json, tokenizer, names and order come from it,
        and so do tensors that the live model does not hold (MTP blocks that are not trained). Returns: their names.
    """
    carried, write = prepare_hf_weights(models, output_dir, origin_dir, max_shard_bytes)
    write.run()
    return carried


def prepare_hf_weights(
    models: Sequence[torch.nn.Module],
    output_dir: str | Path,
    origin: str | Path | Checkpoint,
    max_shard_bytes: int = 5 * 10**9,
    record: Callable[[Path], object] | None = None,
) -> tuple[list[str], Write]:
    """Decide what goes where and which rank writes it; see save_hf_weights. record: writes args.json. Collective."""
    output_dir, origin = Path(output_dir), origin if isinstance(origin, Checkpoint) else Checkpoint.open(origin)
    live = LiveMap(origin.bound)
    shards = [(shard, *live.entry(shard)) for shard in iter_shards(models)]
    held: dict[str, torch.dtype] = {}
    for part in all_gather({name: shard.data.dtype for shard, entry, _ in shards for name in entry.hf}):
        held.update(part)
    bound, stored = origin.bound, [(name, origin.copies.get(name, name)) for name in origin.names]
    carried = [name for name, of in stored if bound.parts(of)[0] not in held]
    plan = HfPlan.of(origin, held, None, max_shard_bytes)
    directory = output_dir.with_name(f".{output_dir.name}.saving")
    output = _Output(directory, plan, [bound.fused[n] for n in plan.specs if n in bound.fused and n not in carried])
    main = get_rank() == 0
    if main:
        output.prepare()
    barrier()
    targets = output.targets()

    def place(name: str, _: str | None = None) -> tuple[Path, int, torch.dtype]:
        return targets[name]

    jobs = [copy_job(origin.stored, name, *targets[name]) for name in carried]
    mine, my_jobs = divide([shard for shard, _, _ in shards], jobs)
    owned = [item for item, is_mine in zip(shards, mine, strict=True) if is_mine]

    def slices() -> Iterator[tuple[torch.Tensor, Entry, tuple[int, ...]]]:
        for shard, entry, offset in owned:
            yield shard.data.detach().view(shard.local_shape).cpu(), entry, offset

    def write(slices: Iterable[tuple[torch.Tensor, Entry, tuple[int, ...]]]) -> None:
        with Files() as files:
            for data, entry, offset in slices:
                write_shard(data, entry, offset, files, place)
                for copy in (c for c, of in origin.copies.items() if of == entry.hf[0]):
                    write_shard(data, entry, offset, files, partial(place, copy))
            files.sync()
        stream.run(my_jobs)

    def publish() -> None:
        output.join()
        if carried:
            get_logger().info("%d tensors that training does not hold are carried over unchanged", len(carried))
        if main:
            plan.publish(directory)
            if record is not None:
                record(directory)
            replace_directory(directory, output_dir)
        barrier()

    nbytes = sum(shard.data.nbytes for shard, _, _ in owned)
    return carried, Write(nbytes, lambda: write(slices()), lambda: partial(write, list(slices())), [publish])


class _Output:
    """The files that are written. Ranks write their slices where they belong; those of experts that are saved in one
    tensor and do not lie together there go to a file beside, which `join` makes the tensor of when all are there."""

    def __init__(self, directory: Path, plan: HfPlan, fused: Sequence[FusedTensor]) -> None:
        """fused: the tensors that are made of live experts."""
        self.directory, self.beside = directory, directory / "parts"
        self.plan, self.fused = plan, fused
        self.loose = [tensor for tensor in fused if any(tensor.offset(part) is None for part in tensor.views)]
        specs = {p: TensorSpec(plan.specs[t.name].dtype, t.part_shape(p)) for t in self.loose for p in t.views}
        self.shard = plan_shards(specs, 1 << 62)[0]

    def prepare(self) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)
        self.directory.mkdir(parents=True)
        self.plan.prepare(self.directory)
        if self.loose:
            self.beside.mkdir()
            create_shards(self.beside, [self.shard])

    def targets(self) -> dict[str, tuple[Path, int, torch.dtype]]:
        """tensor, or part of one -> file, offset of its data there, dtype."""
        places = self.plan.places(self.directory)
        found = {name: (*places[name], spec.dtype) for name, spec in self.plan.specs.items()}
        for tensor in self.fused:
            file, start, dtype = found[tensor.name]
            for part in tensor.views:
                offset = tensor.offset(part)
                if offset is None:
                    found[part] = (self.beside / self.shard.file, self.shard.offsets[part], dtype)
                else:
                    found[part] = (file, start + offset * dtype.itemsize, dtype)
        return found

    def join(self) -> None:
        """Collective."""
        if not self.loose:
            return
        source, targets = Joined(SafetensorsSource(self.beside), self.loose), self.targets()
        jobs = [copy_job(source, tensor.name, *targets[tensor.name]) for tensor in self.loose]
        stream.run(divide([], jobs)[1])
        barrier()
        if get_rank() == 0:
            shutil.rmtree(self.beside)


def divide(shards: Sequence[ShardedTensor], jobs: Sequence[stream.Job]) -> tuple[list[bool], list[stream.Job]]:
    """Which of its shards, and of everybody's jobs, this rank writes: one rank each, balanced by bytes. Collective.

    Replicas hold the same values, so any of them may write.
    """
    keys = [(shard.key, tuple(shard.global_offset), tuple(shard.local_shape)) for shard in shards]
    sizes = [shard.data.nbytes for shard in shards]
    holders: dict[object, list[int]] = {}
    nbytes: dict[object, int] = {}
    for rank, part in enumerate(all_gather(list(zip(keys, sizes, strict=True)))):
        for shard_key, size in part:
            holders.setdefault(shard_key, []).append(rank)
            nbytes[shard_key] = size
    for number, job in enumerate(jobs):
        holders[number], nbytes[number] = list(range(get_world_size())), job.nbytes
    loads, owner = [0] * get_world_size(), dict[object, int]()
    # What only one rank has comes first, then the largest.
    for key in sorted(holders, key=lambda k: (len(holders[k]), -nbytes[k], str(k))):
        owner[key] = min(holders[key], key=lambda rank: (loads[rank], rank))
        loads[owner[key]] += nbytes[key]
    rank = get_rank()
    return [owner[key] == rank for key in keys], [job for i, job in enumerate(jobs) if owner[i] == rank]
