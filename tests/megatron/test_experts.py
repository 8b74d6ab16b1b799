"""Experts as one weight and grouped products, compared to megatron-core's one by one: same numbers, same names on disk."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from swiftlite.checkpoint.checkpoint import Checkpoint
from swiftlite.megatron import hf_io
from swiftlite.megatron.distributed import parallel_groups
from swiftlite.megatron.model.experts import GroupedExperts, LocalDispatcher, counts_stay_on_device
from swiftlite.megatron.model.provider import build_models
from swiftlite.megatron.shards import iter_shards
from swiftlite.megatron.tuners.lora import prepare_lora
from tests.families.cases import build_hf, config_of
from tests.megatron.test_hf_io import IDS, assert_close, live, logits
from tests.megatron.test_lora import by_name, lora_args, set_by_name

CASES = ["glm4_5:default", "qwen3_moe:mlp_only", "moonlight:default"]


@contextmanager
def grouped(directory: Path) -> Iterator[Any]:
    """The model of a directory with grouped experts, unloaded."""
    with live(directory) as (_, args):
        args.moe_grouped_impl = "torch"
    with parallel_groups(args):
        yield build_models(args)[0]


def shards(model: Any) -> dict[Any, Any]:
    return {
        (s.key, s.global_offset, s.local_shape, s.global_shape, s.prepend_axis_num, s.replica_id): s.data
        for s in iter_shards([model])
    }


@pytest.mark.parametrize("case", CASES)
def test_equals_one_by_one(case: str, tmp_path: Path) -> None:
    """Logits, gradients by the shard's name, names on disk. Two tokens only: most experts get none."""
    build_hf(config_of(case), tmp_path / "hf")
    found = []
    for ids in (IDS, IDS[:1, :2]):
        for build in (live, grouped):
            with build(tmp_path / "hf") as built:
                model = built if build is grouped else built[0][0]
                experts = [m for m in model.modules() if isinstance(m, GroupedExperts)]
                assert bool(experts) == (build is grouped) == counts_stay_on_device([model])
                hf_io.load_weights([model], tmp_path / "hf")
                out = logits(model, ids)
                (out * torch.linspace(0, 1, out.numel()).view(out.shape)).sum().backward()
                weights = shards(model)
                for parameter in model.parameters():
                    parameter.data.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
                found.append((out, weights, {name: data.clone() for name, data in shards(model).items()}))
    for plain, mine in (found[:2], found[2:]):
        assert_close(mine[0], plain[0])
        assert mine[1].keys() == plain[1].keys()
        for name, gradient in plain[2].items():
            assert (mine[2][name] - gradient).norm() <= 1e-4 * max(float(gradient.norm()), 1e-6), name


def test_adapters_on_grouped_experts(tmp_path: Path) -> None:
    build_hf(config_of("glm4_5:default"), tmp_path / "hf")
    found = []
    for build in (live, grouped):
        with build(tmp_path / "hf") as built:
            model = built if build is grouped else built[0][0]
            args = lora_args()
            args.mcore_adapter = None
            prepare_lora([model], Checkpoint.open(tmp_path / "hf"), args)
            hf_io.load_weights([model], tmp_path / "hf")
            names = sorted(by_name(model).items())
            set_by_name(model, {
                name: 0.1 * torch.randn(value.shape, generator=torch.Generator().manual_seed(number))
                for number, (name, value) in enumerate(names)
            })  # fmt: skip
            out = logits(model, IDS)
            (out * torch.linspace(0, 1, out.numel()).view(out.shape)).sum().backward()
            found.append((out, by_name(model, gradients=True)))
            assert (len(dict(model.adapters.named_parameters())) < len(names)) == (build is grouped)
    assert_close(found[1][0], found[0][0])
    assert found[0][1].keys() == found[1][1].keys()
    for name, gradient in found[0][1].items():
        assert (found[1][1][name] - gradient).norm() <= 1e-4 * max(float(gradient.norm()), 1e-6), name


def test_a_dispatcher_that_waits_for_nothing(tmp_path: Path) -> None:
    build_hf(config_of("glm4_5:default"), tmp_path / "hf")
    with grouped(tmp_path / "hf") as model:
        assert isinstance(model.decoder.layers[1].mlp.token_dispatcher, LocalDispatcher)
