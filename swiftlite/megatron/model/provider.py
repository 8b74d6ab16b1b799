"""The one model_provider: verification and training build the same GPTModel here.

Models are always lists, one chunk per virtual pipeline stage. Shapes: V vocabulary rows, H hidden size.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state as mpu
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.tensor_parallel.mappings import all_gather_last_dim_from_tensor_parallel_region
from megatron.core.transformer.moe import router as core_router
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor

from swiftlite.arguments.parallel import MegatronArguments
from swiftlite.families import family_of
from swiftlite.megatron import backend
from swiftlite.megatron.model import experts, rope
from swiftlite.megatron.model.blocks import load_blocks
from swiftlite.megatron.model.blocks.router import TopKRouter
from swiftlite.megatron.model.chunked_loss import GPTModel
from swiftlite.megatron.model.config import to_transformer_config, virtual_stages
from swiftlite.megatron.model.head import NoHead, ScoreHead
from swiftlite.megatron.model.spec import block_spec, mtp_spec
from swiftlite.plan.memory import logits_at_once

# Hugging Face builds MLA's latent norms with this epsilon, whatever rms_norm_eps says.
LATENT_NORM_EPS = 1e-6


def padded_vocab_size(vocab_size: int, tp_size: int) -> int:
    """Rows of the live embedding: the checkpoint's, rounded up to a multiple of the TP size."""
    return math.ceil(vocab_size / tp_size) * tp_size


def model_provider(
    args: MegatronArguments,
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    **overrides: object,
) -> GPTModel:
    """Build one model chunk of this rank on the CPU or the rank's GPU, without weights.

    Args:
        args: MegatronArguments with the model's fields set; parallel groups must exist.
        pre_process, post_process: the chunk holds the embedding, the output layer.
        vp_stage: number of the chunk under virtual pipelining.
        overrides: TransformerConfig fields, over those of `args` (`perform_initialization=True` for random weights).
    Raises: ConfigError for what megatron-core cannot compute.
    """
    config = to_transformer_config(args, **overrides)
    description = args.description
    frequencies = rope.Rope(description)
    if not description.multi_latent_attention:
        frequencies.set_attention_factor(config)
    blocks = load_blocks(family_of(description.architectures).blocks if description.architectures else ())
    replaced = {core_router.TopKRouter: TopKRouter, **experts.replacements(args, config)}
    for block in blocks:
        replaced |= block.replacements(args) if hasattr(block, "replacements") else {}
    spec = block_spec(config, vp_stage, replaced)
    for change in (block.change_layer for block in blocks if hasattr(block, "change_layer")):
        for index, layer in enumerate(spec.layer_specs, get_transformer_layer_offset(config, vp_stage)):
            change(layer, args, index)
    vocab_size = description.padded_vocab_size
    assert vocab_size is not None
    live_vocab_size = padded_vocab_size(vocab_size, config.tensor_model_parallel_size)
    with backend.choosing_attention():
        model = GPTModel(
            config=config,
            transformer_layer_spec=spec,
            vocab_size=live_vocab_size,
            max_sequence_length=description.max_position_embeddings,
            pre_process=pre_process,
            post_process=post_process,
            share_embeddings_and_output_weights=not description.untie_embeddings_and_output_weights,
            position_embedding_type="rope",
            rotary_base=description.rotary_base,
            mtp_block_spec=mtp_spec(config, spec, vp_stage),
            vp_stage=vp_stage,
        )
    model.vp_stage = vp_stage
    model.logits_at_once = partial(logits_at_once, args)
    rope.install(model, frequencies)
    _correct(model, description.multi_latent_attention)
    if live_vocab_size > vocab_size:
        _mask_padded_vocabulary(model, vocab_size, live_vocab_size)
    for adapt in (block.adapt for block in blocks if hasattr(block, "adapt")):
        adapt(model, args)
    labels = description.num_labels
    if post_process and labels is not None:
        model.output_layer = ScoreHead(config, labels) if labels else NoHead(config)
    return model


def build_models(args: MegatronArguments, **overrides: Any) -> list[GPTModel]:
    """All model chunks of this rank, one per virtual pipeline stage, before Float16Module and DDP. See model_provider."""
    stages = virtual_stages(args)
    first = mpu.get_pipeline_model_parallel_rank() == 0
    last = mpu.get_pipeline_model_parallel_rank() == mpu.get_pipeline_model_parallel_world_size() - 1
    if stages is None:
        return [model_provider(args, first, last, **overrides)]
    return [
        model_provider(args, first and stage == 0, last and stage == stages - 1, stage, **overrides)
        for stage in range(stages)
    ]


def _correct(model: GPTModel, mla: bool) -> None:
    """Where megatron-core computes or marks otherwise than transformers' models need."""
    if hasattr(model, "embedding"):  # dropped as layer outputs are
        model.embedding.embedding_dropout.p = 0.0
    _mark_divided_weights(model)
    _mark_expert_weights(model)
    experts.keep_counts_on_device(model)
    if mla:
        _set_latent_norm_eps(model)
        _join_latents(model)


def _mark_divided_weights(model: GPTModel) -> None:
    """Mark weights that are divided over TP ranks: the gradient norm counts unmarked ones on rank 0 only.

    megatron-core marks them while it initialises them, so not with perform_initialization false.
    """
    for module in model.modules():
        dim = 0 if isinstance(module, ColumnParallelLinear | VocabParallelEmbedding) else 1
        weight = getattr(module, "weight", None)
        if isinstance(module, ColumnParallelLinear | VocabParallelEmbedding | RowParallelLinear):
            if weight is not None and not hasattr(weight, "tensor_model_parallel"):
                set_tensor_model_parallel_attributes(weight, True, dim, 1)
        sinks = getattr(module, "softmax_offset", None)
        if isinstance(sinks, torch.nn.Parameter):
            set_tensor_model_parallel_attributes(sinks, True, 0, 1)


def _mark_expert_weights(model: GPTModel) -> None:
    """Have gradients of experts summed over the ranks that hold the same ones, where these are others than usual.

    megatron-core does so only under expert parallelism, so that experts divided less than other layers would drift. Their
    last biases it would sum over tensor parallel ranks too, and count in the gradient norm on the first of these only.
    """
    if mpu.get_expert_tensor_parallel_world_size() != mpu.get_tensor_model_parallel_world_size():
        for name, parameter in model.named_parameters():
            if ".mlp.experts." in name:
                parameter.allreduce = False  # type: ignore[attr-defined]
                parameter.sequence_parallel = False  # type: ignore[attr-defined]
                parameter.tensor_model_parallel = True  # type: ignore[attr-defined]


def _set_latent_norm_eps(model: GPTModel) -> None:
    for module in model.modules():
        for name in ("q_layernorm", "kv_layernorm", "linear_q_up_proj", "linear_kv_up_proj"):
            norm = getattr(module, name, None)  # a norm of its own, or one fused into the linear layer
            if norm is not None and hasattr(norm, "eps"):
                norm.eps = LATENT_NORM_EPS


def _join_latents(model: GPTModel) -> None:
    """Under TP, have a divided key/value down projection give all columns of this rank's part of the sequence.

    That is what megatron-core's MLA gets from Transformer Engine's undivided layer. What it does with a divided one
    loses gradients: each rank's heads use the rotary key, whose gradients it never adds up.
    """
    tp_size, tp_rank = mpu.get_tensor_model_parallel_world_size(), mpu.get_tensor_model_parallel_rank()
    if tp_size == 1 or not model.config.sequence_parallel:
        return

    def join(_: object, __: object, output: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
        latents, bias = output  # [S, B, columns / TP]
        part = latents.shape[0] // tp_size
        return all_gather_last_dim_from_tensor_parallel_region(latents)[tp_rank * part : (tp_rank + 1) * part], bias

    for module in model.modules():
        down = getattr(module, "linear_kv_down_proj", None)
        if isinstance(down, ColumnParallelLinear):
            down.register_forward_hook(join)


def _mask_padded_vocabulary(model: GPTModel, vocab_size: int, live_vocab_size: int) -> None:
    """Rows behind the checkpoint's vocabulary: zero weights, logits of -inf, so the softmax never sees them."""
    tp_size, tp_rank = mpu.get_tensor_model_parallel_world_size(), mpu.get_tensor_model_parallel_rank()
    rows = live_vocab_size // tp_size
    used = max(min(vocab_size - tp_rank * rows, rows), 0)  # of this rank's rows
    with torch.no_grad():
        if hasattr(model, "embedding"):
            model.embedding.word_embeddings.weight[used:].zero_()
        if getattr(model, "output_layer", None) is not None and model.output_layer.weight is not None:
            model.output_layer.weight[used:].zero_()

    def mask(_: object, __: object, output: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
        logits, bias = output  # [S, B, rows], or [S, B, V] where the layer gathers
        start = used if logits.shape[-1] == rows else vocab_size
        if start == logits.shape[-1]:
            return output
        padding = torch.arange(logits.shape[-1], device=logits.device) >= start
        return logits.masked_fill(padding, float("-inf")), bias

    if hasattr(model, "output_layer"):
        model.output_layer.register_forward_hook(mask)
