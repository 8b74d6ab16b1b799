"""Live load and save of one model under one layout: [directory, layout, where to save]; every rank checks its shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state as mpu

from swiftlite.arguments.megatron_export import conversion_arguments
from swiftlite.checkpoint.bind import bind_map, convert_hf_config
from swiftlite.checkpoint.checkpoint import Checkpoint
from swiftlite.checkpoint.info import read_config
from swiftlite.megatron import backend, hf_io, shards
from swiftlite.megatron.distributed import destroy, initialize
from swiftlite.megatron.model.provider import build_models
from swiftlite.plan.layouts import own_layout
from swiftlite.plan.memory import TrainingModel
from swiftlite.utils.dist import all_gather, get_rank, get_world_size
from swiftlite.weights.dcp_file import TorchDistSource
from swiftlite.weights.safetensors import SafetensorsSource
from swiftlite.weights.storage import Files, read_tensor
from swiftlite.weights.torch_dist import McoreView


def check(root: Path, layout: dict[str, Any], save_to: Path) -> None:
    """Load `root`/hf and `root`/mcore, compare each shard with the offline slice, count bytes, save as Hugging Face."""
    layout = dict(layout)
    mtp = layout.pop("mtp_num_layers", None)
    config = read_config(root / "hf")
    args = conversion_arguments(convert_hf_config(config), str(root), "float32")
    for name, value in layout.items():
        setattr(args, name, value)
    args.mtp_num_layers = mtp
    try:
        initialize(args)
        models = build_models(args)
        if not mtp and not args.description.multi_latent_attention:  # the plain MLA spec divides more than the GPU one
            planned = TrainingModel(bind_map(config), args, torch.float32).elements(
                own_layout(args, get_world_size()), mpu.get_pipeline_model_parallel_rank()
            )
            held = sum(p.numel() for model in models for p in model.parameters())
            assert held == planned[0] + planned[1], (layout, held, planned)
        bound = Checkpoint.open(root / "hf").bound
        view = McoreView.open(TorchDistSource(root / "mcore/iter_0000001"), bound)
        live = shards.LiveMap(bound)
        for source in ("hf", "mcore"):
            for shard in shards.iter_shards(models):
                shard.data.detach().fill_(float("nan"))
            read = hf_io.load_weights(models, root / source)
            expected_bytes = compared = 0
            with Files() as files:
                for shard in shards.iter_shards(models):
                    entry, offset = live.entry(shard)
                    slot = view.slots[entry.mcore, entry.expert]
                    whole = read_tensor(view.source, slot.key, files)[slot.index]
                    where = tuple(slice(o, o + n) for o, n in zip(offset, shard.local_shape, strict=True))
                    wanted = whole[where]
                    mine = shard.data.view(shard.local_shape)
                    if wanted.shape != mine.shape:  # vocabulary padding: zero rows
                        assert "vocab" in entry.rule.hf[0].dims and not mine[len(wanted) :].any()
                        mine = mine[: len(wanted)]
                    assert torch.equal(mine, wanted), (entry.label, source)
                    expected_bytes += shard.data.numel() * shard.data.element_size()
                    compared += 1
            assert compared > 5 and read == expected_bytes, (read, expected_bytes)
        check_writers(models, save_to, root / "hf")
    finally:
        destroy()
    if get_rank() == 0:
        for file in (root / "hf").glob("*.safetensors"):
            assert (save_to / file.name).read_bytes() == file.read_bytes(), f"{layout}: {file.name} differs"


def check_writers(models: list[Any], save_to: Path, origin: Path) -> None:
    """Save, and see that the ranks wrote every byte once, each about as many."""
    written: list[tuple[str, int, int]] = []
    original = Files.write

    def write(self: Files, path: Path, offset: int, buffer: memoryview) -> None:
        # Parts that are joined later are their tensor's; it is written once, too.
        written.append((str(path.relative_to(save_to.parent)), offset, len(buffer)))
        original(self, path, offset, buffer)

    Files.write = write  # type: ignore[method-assign]
    try:
        hf_io.save_hf_weights(models, save_to, origin)
    finally:
        Files.write = original  # type: ignore[method-assign]
    parts = all_gather(written)
    spans = sorted(span for part in parts for span in part)
    ends = {name: 0 for name, _, _ in spans}
    for name, offset, size in spans:
        assert offset >= ends[name], f"byte {offset} of {name} is written twice"
        ends[name] = offset + size
    saved = SafetensorsSource(save_to).tensors.values()
    data = sum(t.spec.nbytes for t in saved)
    assert sum(size for name, _, size in spans if "/parts/" not in name) == data
    loads = [sum(size for _, _, size in part) for part in parts]
    # Shards are divided evenly, then the tensors that are joined of parts.
    joined = max((t.spec.nbytes for t in saved if len(t.spec.shape) == 3), default=0)
    largest = max(shard.data.nbytes for shard in shards.iter_shards(models)) + joined
    if mpu.get_pipeline_model_parallel_world_size() == 1:  # stages hold what they hold
        assert max(loads) - min(loads) <= largest, loads


def run_case(case: list[Any]) -> None:
    root, layout, save_to = case
    backend.setup()
    check(Path(root), layout, Path(save_to))
    if get_rank() == 0:
        print(f"ok {Path(root).name} {layout}", flush=True)
