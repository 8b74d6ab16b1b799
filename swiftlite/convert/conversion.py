"""The one conversion: any checkpoint or adapter into any target, offline: plan, stream, verify, rename into place.

No model or GPU is involved, and neither megatron-core nor transformers is imported. Several processes share the work by
output file; they exchange barriers and hashes, never tensor data.

A target (hf.py, mcore.py, peft.py) lays the output out before the first weight is read (`plan`). The plan has a kind (what
is written), options (what the output depends on besides the source), sizes of files and total_bytes, and
    prepare(directory)  makes the files, at their final size
    jobs(directory)     what is copied there, in the order of the source's files, so that reading is sequential
    publish(directory, hashes)  writes what belongs to the weights; hashes of all tensors; on rank 0, after the jobs
    written(directory)  what was written, under the names of the jobs' sources
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

from swiftlite.checkpoint.adapter import Adapter
from swiftlite.checkpoint.checkpoint import Checkpoint
from swiftlite.convert.execute import run_jobs, verify_bitwise
from swiftlite.convert.hf import CarriedPlan, HfPlan
from swiftlite.convert.mcore import McorePlan
from swiftlite.convert.peft import AdapterPlan
from swiftlite.utils.dist import barrier, get_rank, host_group
from swiftlite.utils.io import format_bytes, peak_memory_bytes
from swiftlite.utils.logger import get_logger
from swiftlite.utils.output import check_output
from swiftlite.weights import stream
from swiftlite.weights.journal import fingerprint, workspace

Plan = HfPlan | McorePlan | AdapterPlan
Source = TypeVar("Source", Checkpoint, Adapter, contravariant=True)


class Target(Protocol[Source]):
    def plan(self, source: Source) -> Plan:
        """Raises: CheckpointError, MapError, ShapeError or ConfigError naming what cannot be written so."""


def _nothing(_: Path) -> None:
    pass


@dataclass(frozen=True)
class Options:
    """How a conversion is carried out, whatever it converts.

    record: writes args.json into the finished directory. check: a last check of it, before it takes its name.
    max_memory: bytes of blocks in flight, of all processes of a host. verify: read everything back. quiet: no summary.
    """

    exist_ok: bool = False
    allow_overflow: bool = False
    max_memory: int | None = None
    verify: bool = False
    quiet: bool = False
    record: Callable[[Path], object] = _nothing
    check: Callable[[Path], object] = _nothing


def convert(
    source: Source,
    target: Target[Source],
    output_dir: Path,
    options: Options = Options(),
    show: Callable[[Plan], None] | None = None,
) -> Plan:
    """Write `source` as `target` into `output_dir`, which appears when everything has succeeded. Collective.

    Args: show: is given the plan instead, and nothing is written.
    Returns: what was planned. Raises: UsageError, BudgetError, CheckpointError, MapError, ShapeError before anything is
        written; VerifyError if bytes read back are others.
    """
    started, plan = time.time(), target.plan(source)
    log = get_logger().debug if options.quiet else get_logger().info
    log("%s: %s -> %s", plan.kind, source.directory, output_dir)
    for line in source.summary():
        log("%s", line)
    log("%s in %d files; planned peak memory %s", format_bytes(plan.total_bytes), len(plan.sizes),
        format_bytes(peak_memory_bytes() + stream.planned_bytes(options.max_memory)))  # fmt: skip
    if show is not None:
        show(plan)
        return plan
    check = partial(check_output, output_dir, plan.kind, options.exist_ok, source.directories, needed=plan.total_bytes)
    check()

    def identity() -> str:
        return fingerprint(source.inputs, plan.options)

    def prepare(directory: Path) -> None:
        source.check_copies()
        plan.prepare(directory)

    with host_group(), workspace(output_dir, check, plan.kind, identity, prepare) as space:
        jobs = plan.jobs(space.directory)
        hashes = run_jobs(plan.kind, jobs, options.max_memory, space, options.allow_overflow)
        if get_rank() == 0:
            plan.publish(space.directory, hashes)
            options.record(space.directory)
        barrier()
        if options.verify:
            verify_bitwise(plan.written(space.directory), hashes, jobs, options.max_memory)
        options.check(space.directory)
    seconds = time.time() - started
    log("wrote %s (%s) in %.1f s, %s/s, measured peak memory %s", output_dir, format_bytes(plan.total_bytes), seconds,
        format_bytes(plan.total_bytes / max(seconds, 1e-9)), format_bytes(peak_memory_bytes()))  # fmt: skip
    return plan


def write_into(plan: CarriedPlan | AdapterPlan, directory: Path) -> None:
    """The weights of a plan, into a directory that somebody else sees through: in this process, without a journal."""
    plan.prepare(directory)
    stream.run(plan.jobs(directory))
