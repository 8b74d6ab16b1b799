"""A training loop of megatron-core's own pieces, as its examples have it: what swiftlite is to be no slower than."""

from __future__ import annotations

import time
from functools import partial
from typing import Any


def losses(config: dict[str, Any], micro: int, length: int, batch: int, steps: int) -> list[dict[str, float]]:
    """Train on random tokens with Transformer Engine's layers, DDP and the distributed optimizer. One GPU, no pipeline.

    Returns: {"loss", "step_s", "tokens_per_second", "mfu", "memory_gib"} of each step.
    """
    import torch
    from megatron.core import parallel_state as mpu
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.module import Float16Module

    from swiftlite.train.flops import attention_pairs, flops_of, peak_flops

    torch.cuda.set_device(0)
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("nccl", store=store, rank=0, world_size=1)
    mpu.initialize_model_parallel()
    model_parallel_cuda_manual_seed(0)
    core = TransformerConfig(
        num_layers=config["num_hidden_layers"], hidden_size=config["hidden_size"],
        num_attention_heads=config["num_attention_heads"], num_query_groups=config["num_key_value_heads"],
        kv_channels=config["head_dim"], ffn_hidden_size=config["intermediate_size"], gated_linear_unit=True,
        activation_func=torch.nn.functional.silu, add_bias_linear=False, normalization="RMSNorm", qk_layernorm=True,
        layernorm_epsilon=1e-6, bf16=True, params_dtype=torch.bfloat16, pipeline_dtype=torch.bfloat16,
        attention_dropout=0.0, hidden_dropout=0.0, bias_activation_fusion=True, bias_dropout_fusion=True,
        apply_rope_fusion=True, calculate_per_token_loss=True,
    )  # fmt: skip
    spec = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=True)
    model = GPTModel(
        core, spec, config["vocab_size"], length, position_embedding_type="rope", rotary_base=1000000,
        share_embeddings_and_output_weights=False,
    )  # fmt: skip
    settings = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True)
    model = DistributedDataParallel(core, settings, Float16Module(core, model.cuda()))
    optimizer = get_megatron_optimizer(
        OptimizerConfig(optimizer="adam", lr=1e-5, bf16=True, params_dtype=torch.bfloat16, clip_grad=1.0,
                        use_distributed_optimizer=True), [model]
    )  # fmt: skip
    core.finalize_model_grads_func, core.grad_scale_func = finalize_model_grads, optimizer.scale_loss
    tokens = torch.randint(0, 256, (batch, length + 1), device="cuda")
    positions = torch.arange(length, device="cuda").expand(micro, length)

    def total(output: Any) -> Any:
        summed = output.float().sum()
        return summed, torch.tensor(output.numel(), device="cuda", dtype=torch.int), {"loss": summed.detach()}

    def forward(batches: Any, model: Any) -> Any:
        ids = next(batches)
        return model(ids[:, :-1].contiguous(), positions, None, labels=ids[:, 1:].contiguous()), partial(total)

    passes, flops, found = get_forward_backward_func(), flops_of(config), []
    assert flops is not None
    work = flops.training(batch * length, attention_pairs([length]) * batch)
    for _ in range(steps):
        torch.cuda.synchronize()
        began = time.perf_counter()
        model.zero_grad_buffer()
        optimizer.zero_grad()
        results = passes(
            forward_step_func=forward, data_iterator=iter(tokens.split(micro)), model=model,
            num_microbatches=batch // micro, seq_length=length, micro_batch_size=micro, forward_only=False,
        )  # fmt: skip
        optimizer.step()
        loss = float(sum(r["loss"] for r in results)) / (batch * length)
        torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        peak = peak_flops(torch.cuda.get_device_name()) or float("inf")
        found.append({"loss": loss, "step_s": seconds, "tokens_per_second": batch * length / seconds,
                      "mfu": work / seconds / peak, "memory_gib": torch.cuda.max_memory_allocated() / 2**30})  # fmt: skip
    return found


def transformers_losses(directory: str, micro: int, length: int, batch: int, steps: int) -> list[dict[str, float]]:
    """transformers alone: bf16 weights without fp32 ones, its grouped experts, torch's fused AdamW; no Trainer."""
    import json
    from pathlib import Path

    import torch
    from transformers import AutoModelForCausalLM

    from swiftlite.train.flops import attention_pairs, flops_of, peak_flops

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16, device_map="cuda")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    flops, found = flops_of(json.loads((Path(directory) / "config.json").read_text())), []
    assert flops is not None
    work = flops.training(batch * length, attention_pairs([length]) * batch)
    peak = peak_flops(torch.cuda.get_device_name()) or float("inf")
    tokens = torch.randint(0, 256, (batch, length), device="cuda")
    for _ in range(steps):
        torch.cuda.synchronize()
        began = time.perf_counter()
        total = torch.zeros((), device="cuda")
        for ids in tokens.split(micro):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss * micro / batch
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        value = float(total)
        torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        found.append({"loss": value, "step_s": seconds, "tokens_per_second": batch * length / seconds,
                      "mfu": work / seconds / peak, "memory_gib": torch.cuda.max_memory_allocated() / 2**30})  # fmt: skip
    return found
