"""The memory formulas against megatron-core's own buffers, optimizer states, saved tensors and checkpoints."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader

from swiftlite.arguments.megatron_export import conversion_arguments
from swiftlite.arguments.megatron_train import MegatronSftArguments
from swiftlite.arguments.parser import parse
from swiftlite.checkpoint.bind import bind_map, convert_hf_config
from swiftlite.megatron import state as checkpoint
from swiftlite.megatron.distributed import parallel_groups
from swiftlite.megatron.model.provider import build_models
from swiftlite.megatron.trainers.optimizer import build_optimizer, build_scheduler
from swiftlite.megatron.trainers.wrapping import wrap_models
from swiftlite.megatron.tuners.freeze import freeze_parameters, plan_freeze
from swiftlite.plan.layouts import own_layout
from swiftlite.plan.memory import Layout, TrainingModel, even_stages
from swiftlite.plan.report import checkpoint_bytes
from tests.conftest import GOLDEN, TINY_CONFIGS
from tests.families.cases import config_of

CONFIGS = {
    "qwen3": {**TINY_CONFIGS["qwen3"], "tie_word_embeddings": True, "vocab_size": 333},
    "glm4_moe": TINY_CONFIGS["glm4_moe"],
    # The last layer is a gated delta net.
    "qwen3_next": {**config_of("qwen3_next:default"), "full_attention_interval": 3},
    "ernie": config_of("ernie:default"),  # its router's weight keeps its dtype, and is trained
}
AIR = json.loads((GOLDEN / "glm4_5_air/config.json").read_text())


def model_of(config: dict[str, Any], dtype: torch.dtype = torch.bfloat16) -> TrainingModel:
    args = conversion_arguments(convert_hf_config(config), "x", dtype)
    return TrainingModel(bind_map(config), args, dtype)


@contextmanager
def live(config: dict[str, Any], dtype: torch.dtype) -> Iterator[tuple[Any, TrainingModel]]:
    args = conversion_arguments(convert_hf_config(config), "x", dtype)
    args.no_save_optim = args.no_load_optim = False
    with parallel_groups(args):
        yield args, TrainingModel(bind_map(config), args, dtype)


def test_parameters_of_glm_4_5_air_are_known_to_the_unit() -> None:
    assert model_of(AIR).num_parameters == 106_852_245_504


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", CONFIGS)
def test_weights_gradients_and_optimizer_are_what_megatron_core_allocates(family: str, dtype: torch.dtype) -> None:
    with live(CONFIGS[family], dtype) as (args, model):
        models = wrap_models(build_models(args), args)
        optimizer = build_optimizer(models, args)
        checkpoint._allocate_optimizer_state(optimizer)
        need = model.need(Layout(), 1, 128, 1)
        buffers = [b for ddp in models for b in (*ddp.buffers, *ddp.expert_parallel_buffers)]
        assert sum(p.numel() for b in buffers for p in b.params) == model.num_parameters
        starts = 64 * sum(len(b.params) for b in buffers)  # each parameter begins at a multiple of 64 elements
        assert all(b.grad_data.dtype == torch.float32 for b in buffers)
        assert need.gradients <= sum(b.numel_unpadded for b in buffers) * 4 <= need.gradients + 4 * starts
        tensors = [b for ddp in models for n, b in ddp.named_buffers() if "expert_bias" in n and b is not None]
        tensors += [p for ddp in models for p in ddp.parameters()]
        assert sum(t.numel() * t.element_size() for t in tensors) == need.weights
        states = []
        for part in getattr(optimizer, "chained_optimizers", [optimizer]):
            for parameter, state in part.optimizer.state.items():
                states += [state["exp_avg"], state["exp_avg_sq"]]
                states += [] if dtype == torch.float32 else [parameter]  # its own fp32 copy
        assert all(t.dtype == torch.float32 for t in states)
        assert sum(t.numel() * 4 for t in states) == need.optimizer


def test_frozen_parameters_have_neither_gradients_nor_optimizer_states() -> None:
    config = CONFIGS["glm4_moe"]
    with live(config, torch.bfloat16) as (args, model):
        args.train_type, args.freeze_parameters_ratio = "freeze", 0.6
        for name in ("freeze_parameters", "trainable_parameters"):
            setattr(args, name, [])
        args.freeze_parameters_regex = args.trainable_parameters_regex = None
        trained = plan_freeze(model.bound, args)
        assert trained
        plan = replace(model, trained=trained)
        models = build_models(args)
        assert freeze_parameters(models, model.bound, args) == trained
        models = wrap_models(models, args)
        buffers = [b for ddp in models for b in (*ddp.buffers, *ddp.expert_parallel_buffers)]
        assert sum(p.numel() for b in buffers for p in b.params) == plan.num_trained < 0.5 * model.num_trained
        need, whole = (m.need(Layout(), 1, 128, 1) for m in (plan, model))
        assert need.gradients == 4 * plan.num_trained and need.optimizer == 12 * plan.num_trained
        assert need.weights == whole.weights
        assert checkpoint_bytes(model, True) - checkpoint_bytes(plan, True) == 12 * (
            model.num_trained - plan.num_trained
        )


@pytest.mark.parametrize("num_microbatches", [4, 8, 32])
@pytest.mark.parametrize("chunks", [1, 2, 3])
def test_micro_batches_in_flight_are_those_of_the_schedule(
    chunks: int, num_microbatches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    layout = Layout(pp=4, stages=(6 // chunks,) * 4 * chunks, chunks=chunks)
    config = TransformerConfig(
        num_layers=24, hidden_size=8, num_attention_heads=1, pipeline_model_parallel_size=4,
        pipeline_dtype=torch.float32, virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None,
    )  # fmt: skip
    monkeypatch.setattr(parallel_state, "get_pipeline_model_parallel_world_size", lambda: 4)
    monkeypatch.setattr(
        parallel_state, "get_virtual_pipeline_model_parallel_world_size", lambda: chunks if chunks > 1 else None
    )
    for rank in range(4):
        monkeypatch.setattr(parallel_state, "get_pipeline_model_parallel_rank", lambda rank=rank: rank)
        total, _, warmup, _ = get_pp_rank_microbatches(num_microbatches, chunks, 4)
        assert layout.in_flight(rank, num_microbatches) == min(warmup + 1, total) / chunks
        first = [get_transformer_layer_offset(config, chunk if chunks > 1 else None, rank) for chunk in range(chunks)]
        assert layout.layers(rank)[:: 6 // chunks] == first


@pytest.mark.parametrize("mode", [None, "full"])
@pytest.mark.parametrize("family", CONFIGS)
def test_activations_are_among_what_a_layer_saves(family: str, mode: str | None) -> None:
    """Plain kernels keep the formula's tensors and up to as much again; full recomputation keeps exactly one row."""

    def saved(num_layers: int) -> int:
        with live({**CONFIGS[family], "num_hidden_layers": num_layers}, torch.float32) as (args, _):
            args.recompute_granularity = mode
            if mode == "full":
                args.recompute_method, args.recompute_num_layers = "uniform", 1
            model = build_models(args)[0].train()
            own = {p.untyped_storage().data_ptr() for p in model.parameters()}
            kept: dict[int, torch.Tensor] = {}

            def pack(tensor: torch.Tensor) -> torch.Tensor:
                if tensor.untyped_storage().data_ptr() not in own:
                    kept[tensor.untyped_storage().data_ptr()] = tensor
                return tensor

            ids = torch.randint(0, 300, (2, 96))
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                _ = model(ids, torch.arange(96).expand_as(ids), None, labels=ids)
            return sum(t.untyped_storage().nbytes() for t in kept.values())

    measured = saved(4) - saved(3)
    model = model_of({**CONFIGS[family], "num_hidden_layers": 4}, torch.float32)
    model.args.attention_backend = "flash"  # torch's own attention keeps no scores either
    model.args.cross_entropy_loss_fusion = False
    formula = model.layer_activations(Layout(), 3, 2 * 96)
    if mode == "full":
        whole = model._activations(Layout(stages=(4,), recompute="full"), 0, 192, 1)[0]
        rows = 192 * 64 * 4
        loss = 192 * model.bound.model.vocab * 12 + model.bound.model.vocab * 64 * 4 + 2 * rows
        assert measured == rows and 2 * formula > loss
        # One layer whole, and the gradients of its larger half.
        assert 4 * rows + max(loss, 1.3 * formula) <= whole <= 4 * rows + max(loss, 2 * formula)
    else:
        assert formula <= measured <= 2 * formula


# benchmarks/gpu/memory.py on two H200 that share one text of 65,536 tokens: 10^9 bytes that tensors held at most.
QWEN = {
    **TINY_CONFIGS["qwen3"], "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "head_dim": 128,
    "num_attention_heads": 16, "num_key_value_heads": 8, "vocab_size": 151936, "tie_word_embeddings": False,
}  # fmt: skip
AWAY = "attn_norm qkv_linear core_attn attn_proj mlp_norm"
HELD = {
    "--loss_chunk_size 999999": 101.4,
    "": 93.3,
    "--recompute selective --recompute_modules mlp layernorm": 55.9,
    "--recompute full": 32.3,
    f"--fine_grained_activation_offloading true --offload_modules {AWAY}": 69.9,
    "--optimizer_cpu_offload true": 81.2,
    "--use_precision_aware_optimizer true --exp_avg_dtype bf16 --exp_avg_sq_dtype bf16": 89.3,
    "--fp8_format e4m3 --fp8_recipe blockwise": 87.1,
    "--recompute full --optimizer_cpu_offload true": 20.1,
}


@pytest.mark.parametrize("flags", HELD)
def test_a_plan_is_what_gpus_held(flags: str) -> None:
    args = parse(MegatronSftArguments, ["--model", "x", "--context_parallel_size", "2", *flags.split()])
    args.apply_model_config(convert_hf_config(QWEN))
    model = TrainingModel(bind_map(QWEN), args, torch.bfloat16)
    assert model.num_parameters == 2_031_739_904
    need = model.need(own_layout(args, 2), 1, 65536, 1)
    assert (need.total - need.overhead) / 1e9 == pytest.approx(HELD[flags], rel=0.02)


def test_checkpoint_size(tmp_path: Path) -> None:
    """Weights and optimizer as the checkpoint's metadata list them."""
    with live(CONFIGS["glm4_moe"], torch.bfloat16) as (args, model):
        args.train_iters, args.global_batch_size = 2, 1
        models = wrap_models(build_models(args), args)
        optimizer = build_optimizer(models, args)
        checkpoint._allocate_optimizer_state(optimizer)
        scheduler = build_scheduler(optimizer, args, 10, 1)
        position = checkpoint.Position(1, 1)
        path, write = checkpoint.prepare_checkpoint(tmp_path, position, models, args, optimizer, scheduler)
        write.run()
    metadata = FileSystemReader(path).read_metadata()
    sizes = [
        math.prod(t.size) * t.properties.dtype.itemsize
        for name, t in metadata.state_dict_metadata.items()
        if hasattr(t, "properties") and "rng" not in name
    ]
    assert sum(sizes) == checkpoint_bytes(model, with_optimizer=True)


def test_layouts_divide_what_they_say() -> None:
    model = model_of(AIR)
    whole = model.elements(Layout(), 0)
    for layout in model.layouts(16):
        assert layout.gpus == 16 and sum(layout.stages) == 46
        parts = [model.elements(layout, rank) for rank in range(layout.pp)]
        assert sum(p[1] for p in parts) * layout.ep * layout.etp == whole[1]
        assert whole[0] <= sum(p[0] for p in parts) * layout.tp
        assert sum(p[2] for p in parts) == whole[2] == 45 * 128


def test_what_fits_is_within_the_memory_and_needs_fewer_bytes_with_recomputation() -> None:
    model = model_of(AIR)
    found = model.fitting(32, 80 * 10**9, 1, 2048, 16)
    assert found and all(need.total <= 80 * 10**9 for _, need in found)
    assert not model.fitting(8, 80 * 10**9, 1, 2048, 16)
    for layout, need in found:
        full = Layout(**{**vars(layout), "recompute": "full"})
        assert model.need(full, 1, 2048, 16 // layout.dp).activations <= need.activations


def test_even_stages() -> None:
    assert even_stages(46, 2) == (23, 23)
    assert even_stages(46, 4) == (12, 12, 12, 10)
    assert even_stages(4, 8) == () and even_stages(9, 8) == ()


def test_flags_ask_for_the_layout() -> None:
    for layout, _ in model_of(AIR).fitting(64, 80 * 10**9, 1, 2048, 64):
        args = parse(MegatronSftArguments, ["--model", "x", *layout.flags()])
        args.apply_model_config(convert_hf_config(AIR))
        assert own_layout(args, 64) == Layout(**{**vars(layout), "sequence_parallel": layout.tp > 1})
