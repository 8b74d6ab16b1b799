"""Where a release of transformers computes a model otherwise than its authors do: put right after the model is built.

Without this the same checkpoint would give other logits with other releases. Imports nothing heavy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel


def _yarn_softmax_scale(model: Any) -> None:
    """DeepSeek-V2 multiplies the softmax scale by yarn's factor squared, as V3 does; transformers did not at first."""
    scaling = getattr(model.config, "rope_scaling", None) or {}
    all_dim = scaling.get("mscale_all_dim") or 0
    factor = 0.1 * all_dim * math.log(scaling["factor"]) + 1 if all_dim and scaling["factor"] > 1 else 1.0
    for module in model.modules():
        if hasattr(module, "qk_head_dim") and hasattr(module, "scaling"):
            module.scaling = module.qk_head_dim**-0.5 * factor**2


def _experts_of_the_best_groups(model: Any) -> None:
    """No expert outside of the chosen groups is chosen: at first transformers gave those the score 0, which beats the sum
    of a score and a clearly negative bias.
    """
    for module in model.modules():
        if hasattr(module, "get_topk_indices") and hasattr(module, "e_score_correction_bias"):
            module.get_topk_indices = partial(_indices_of_the_best_groups, module)


def _indices_of_the_best_groups(router: Any, scores: Tensor) -> Tensor:
    """Scores [T, E] -> [T, K]. Source: DeepSeek-V3's inference/model.py, Gate.forward."""
    choice = scores.detach().view(-1, router.n_routed_experts) + router.e_score_correction_bias
    groups = choice.unflatten(-1, (router.n_group, -1))
    best = groups.topk(2, dim=-1)[0].sum(-1).topk(router.topk_group, dim=-1)[1]
    others = best.new_ones(groups.shape[:2]).scatter(1, best, 0).bool().unsqueeze(-1)
    return groups.masked_fill(others, float("-inf")).flatten(1).topk(router.top_k, dim=-1, sorted=False)[1]


def _clamped_gates(model: Any) -> None:
    """gpt-oss bounds the gates of its experts by config.json's swiglu_limit; at first transformers had 7 for all."""
    for layer in model.model.layers:
        layer.mlp.experts.limit = getattr(model.config, "swiglu_limit", layer.mlp.experts.limit)


def _capped_scores(model: Any) -> None:
    """Gemma 2 caps the scores of its attention, which torch's kernel cannot; at first transformers took that kernel."""
    if getattr(model.config, "attn_logit_softcapping", None) and model.config._attn_implementation == "sdpa":
        model.config._attn_implementation = "eager"


def _static_alpha(model: Any) -> None:
    """Hunyuan's rope of type 'dynamic' has an alpha that stretches its base at any length; transformers took it for the
    usual one at first, whose frequencies change beyond max_position_embeddings.
    """
    scaling = getattr(model.config, "rope_scaling", None) or {}
    rope = model.model.rotary_emb
    if rope.rope_type == "dynamic" and scaling.get("alpha"):
        rope.rope_type = "ntk_alpha"  # as transformers calls it since


def _no_image_outputs(model: Any) -> None:
    """Llama 4 hands on what its text part has of images, which transformers 5.24 looks for where there is nothing."""

    def hook(_: object, __: object, output: object) -> None:
        vars(output)["image_outputs"] = None

    model.language_model.register_forward_hook(hook)


def _experts_in_autocast(model: PreTrainedModel) -> None:
    """Under autocast products of experts held in one tensor [E, ...] take the dtype of autocast, as all other ones do.

    transformers 5 computes them in the dtype of their weights: fp32 weights made them ten times slower than bf16, and
    a reference with weights of bf16 another model than the policy.
    """
    for module in model.modules():
        if any(p.dim() == 3 for p in module.parameters(recurse=False)) and not hasattr(module, "kernel_size"):
            module.forward = partial(_forward_in_autocast, module)


def _forward_in_autocast(module: torch.nn.Module, *args: object, **kwargs: object) -> object:
    import torch

    own = dict(module.named_parameters(recurse=False))
    device = next(iter(own.values())).device.type
    if not torch.is_autocast_enabled(device):
        return type(module).forward(module, *args, **kwargs)
    dtype = torch.get_autocast_dtype(device)
    # Attributes of the object come before its parameters.
    vars(module).update({name: p.to(dtype) for name, p in own.items() if p.dtype == torch.float32})
    try:
        return type(module).forward(module, *args, **kwargs)
    finally:
        for name in own:
            vars(module).pop(name, None)


# Class of transformers -> correction. Each sets values rather than scaling them, so that releases which are right stay so.
CORRECTIONS: Mapping[str, Callable[[Any], None]] = {
    "DeepseekV2ForCausalLM": _yarn_softmax_scale,  # 4.57 to 5.0; goes when the oldest supported release has mscale
    # 4.57; their routers have no get_topk_indices since
    "DeepseekV3ForCausalLM": _experts_of_the_best_groups,
    "Dots1ForCausalLM": _experts_of_the_best_groups,
    "Glm4MoeForCausalLM": _experts_of_the_best_groups,
    # 4.57
    "Gemma2ForCausalLM": _capped_scores,
    "GptOssForCausalLM": _clamped_gates,
    "HunYuanDenseV1ForCausalLM": _static_alpha,
    "HunYuanMoEV1ForCausalLM": _static_alpha,
    "Llama4ForConditionalGeneration": _no_image_outputs,  # 5.24
}


def correct(model: PreTrainedModel) -> PreTrainedModel:
    """Return `model`, corrected in place where its class needs it. Safe to call twice."""
    _experts_in_autocast(model)
    correction = CORRECTIONS.get(type(model).__name__)
    if correction is not None:
        correction(model)
    return model
