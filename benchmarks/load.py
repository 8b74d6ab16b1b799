"""Time and bytes for two ranks to load their experts (expert parallelism) of a checkpoint, by layout and reader.

    python benchmarks/load.py --gigabytes 2

Layouts: Hugging Face safetensors; Megatron torch_dist as `swiftlite export` writes it, one chunk per layer and expert; the
same tensors with one chunk each, all layers and experts in it. Readers: swiftlite's, which reads byte ranges, and
megatron-core's `dist_checkpointing.load`. Page cache is dropped before each load where the system allows it (root).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch


def write_whole(mcore: Path, target: Path) -> None:
    """The checkpoint `mcore` again, each tensor as one chunk."""
    import torch.distributed.checkpoint as dcp

    from swiftlite.weights.dcp_file import TorchDistSource
    from swiftlite.weights.storage import Files, read_tensor

    source = TorchDistSource(mcore / "iter_0000001")
    with Files() as files:
        tensors = {name: read_tensor(source, name, files) for name in source.tensors}
    shutil.copytree(mcore, target, ignore=shutil.ignore_patterns("*.distcp", ".metadata"))
    dcp.save(tensors, storage_writer=dcp.FileSystemWriter(target / "iter_0000001"), no_dist=True)


def worker(directory: Path) -> None:
    from megatron.core import dist_checkpointing

    from benchmarks.convert import drop_cache
    from swiftlite.arguments.megatron_export import conversion_arguments
    from swiftlite.checkpoint.bind import convert_hf_config
    from swiftlite.megatron.distributed import parallel_groups
    from swiftlite.megatron.hf_io import load_weights
    from swiftlite.megatron.model.provider import build_models

    args = conversion_arguments(
        convert_hf_config(json.loads((directory / "hf/config.json").read_text())), "x", torch.bfloat16
    )
    args.expert_model_parallel_size = 2
    with parallel_groups(args) as parallel:
        models = build_models(args)
        for model in models:
            model.bfloat16()

        def stock(path: Path) -> None:
            state = {"model": models[0].sharded_state_dict()}
            loaded = dist_checkpointing.load(state, str(path), strict="ignore_all")
            models[0].load_state_dict(loaded["model"], strict=False)

        rows: dict[str, Callable[[], object]] = {
            "safetensors, swiftlite": lambda: load_weights(models, directory / "hf"),
            "a chunk per expert, swiftlite": lambda: load_weights(models, directory / "mcore"),
            "a chunk per expert, megatron-core": lambda: stock(directory / "mcore/iter_0000001"),
            "a chunk per tensor, swiftlite": lambda: load_weights(models, directory / "whole"),
            "a chunk per tensor, megatron-core": lambda: stock(directory / "whole/iter_0000001"),
        }
        own = sum(
            t.numel() * t.element_size() for model in models for t in model.state_dict().values() if t is not None
        )
        if parallel.rank == 0:
            print(f"2 ranks, each with {own / 1e9:.2f} GB of the model; the slower rank")
            print(f"{'':<36}{'seconds':>9}{'GB read':>9}{'beside own':>12}")
        sums = []
        for name, load in rows.items():
            if parallel.rank == 0:
                drop_cache()
            torch.distributed.barrier()
            before, started = _read_bytes(), time.perf_counter()
            load()
            found = torch.tensor([time.perf_counter() - started, _read_bytes() - before], dtype=torch.float64)
            torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
            sums.append(sum(float(p.double().sum()) for model in models for p in model.parameters()))
            if parallel.rank == 0:
                print(f"{name:<36}{found[0]:>9.2f}{found[1] / 1e9:>9.2f}{found[1] / own:>12.2f}", flush=True)
        assert len(set(sums)) == 1, f"the loads differ: {sums}"


def _read_bytes() -> int:
    """What this process has asked read() and its like for."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["rchar"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2)
    parser.add_argument("--directory", type=Path, default=Path("/tmp/swiftlite-bench-load"))
    args = parser.parse_args()
    root = Path(__file__).resolve().parents[1]
    sys.path.insert(0, str(root))
    if "RANK" in os.environ:
        worker(args.directory)
        return
    from benchmarks.synthetic import make_checkpoint

    shutil.rmtree(args.directory, ignore_errors=True)
    total = make_checkpoint(args.directory / "hf", "moe", args.gigabytes)
    # Random bytes are not numbers: what is compared after loading must not be NaN.
    for shard in (args.directory / "hf").glob("*.safetensors"):
        _plain_numbers(shard)
    export = [sys.executable, "-m", "swiftlite", "export", "--model", str(args.directory / "hf"), "--to_mcore", "true"]
    export += ["--model_type", "glm4_5", "--output_dir", str(args.directory / "mcore")]
    subprocess.run(export, check=True, capture_output=True)
    write_whole(args.directory / "mcore", args.directory / "whole")
    print(f"MoE of {total / 1e9:.2f} GB")
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", __file__]
    subprocess.run([*torchrun, "--directory", str(args.directory)], check=True, env=environment)


def _plain_numbers(shard: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(shard)
    save_file({name: torch.nan_to_num(t, 0.0, 1.0, -1.0).clamp(-1, 1) for name, t in tensors.items()}, shard)


if __name__ == "__main__":
    main()
