"""`swiftlite verify DIR_A DIR_B`: the same tensors with the same bytes? Either directory may have either format."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from swiftlite.arguments.export import VerifyArguments
from swiftlite.checkpoint.checkpoint import Checkpoint, checkpoint_root
from swiftlite.checkpoint.resolve import as_arguments, register_custom
from swiftlite.checkpoint.side_files import read_hashes
from swiftlite.utils.errors import VerifyError
from swiftlite.utils.io import format_bytes
from swiftlite.utils.logger import get_logger
from swiftlite.utils.progress import progress_bar
from swiftlite.weights.storage import Files, TensorSpec, WeightSource
from swiftlite.weights.stream import hash_tensor


def verify_main(args: VerifyArguments | Sequence[str]) -> None:
    """Compare names, dtypes, shapes and bytes; copies that only one side stores are not a difference.

    Quantised weights are compared dequantised, in the dtype of the other side.

    Raises: VerifyError naming the first tensor that differs.
    """
    args = as_arguments(VerifyArguments, args)
    register_custom(args.custom_register_path)
    paths = [Path(d) for d in args.directories]
    a, b = (Checkpoint.open(path) for path in paths)
    known = [read_hashes(checkpoint_root(path)) if args.quick else {} for path in paths]
    names, others = ([part for name in o.names if name not in o.copies for part in o.bound.parts(name)] for o in (a, b))
    for here, there, missing in ((0, 1, set(others) - set(names)), (1, 0, set(names) - set(others))):
        if missing:
            raise VerifyError(
                f"{sorted(missing)[0]} is in {paths[there]} but not in {paths[here]} ({len(missing)} such tensors)"
            )
    total = sum(a.source.spec(name).nbytes for name in names)
    with Files() as files, progress_bar(total=total, unit="B", unit_scale=True, desc="verify") as bar:
        for name in names:
            specs = _comparable(name, a.source, b.source)
            if specs[0] != specs[1]:
                raise VerifyError(f"{name} is {specs[0]} in {paths[0]}, {specs[1]} in {paths[1]}")
            digests = [
                hashes.get(name) or hash_tensor(origin.source, name, files, specs[0].dtype)
                for origin, hashes in zip((a, b), known, strict=True)
            ]
            if digests[0] != digests[1]:
                raise VerifyError(f"{name} differs between {paths[0]} and {paths[1]}")
            bar.update(a.source.spec(name).nbytes)
    get_logger().info("equal: %d tensors, %s", len(names), format_bytes(total))


def _comparable(name: str, *sources: WeightSource) -> list[TensorSpec]:
    """The specs of a tensor on both sides, one that is decoded as what it is compared in."""
    stored = [source.spec(name) for source in sources]
    plain = [s.dtype for s, source in zip(stored, sources, strict=True) if s.dtype == source.value_dtype(name)]
    decoded = len(plain) < len(sources)
    return [TensorSpec((plain or [torch.float32])[0] if decoded else s.dtype, s.shape) for s in stored]
