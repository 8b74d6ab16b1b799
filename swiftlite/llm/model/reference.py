"""Reference models for architectures that transformers knows only through remote code: MiMo, DeepSeek-MoE, and InternLM3
before transformers 5.

They are used where a Hugging Face side is needed to compare with (the precision check, tests); remote code itself runs
only with --trust_remote_code true. Tensor names are those of the published checkpoints.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.llama.modeling_llama import LlamaMLP


class MiMoConfig(Qwen2Config):
    model_type = "mimo"


class MiMoForCausalLM(Qwen2ForCausalLM):
    """MiMo's main model is Qwen2 with an explicit head_dim; its MTP blocks take no part in the main logits."""

    config_class = MiMoConfig
    config: MiMoConfig
    _keys_to_ignore_on_load_unexpected = [r"model\.mtp_layers\..*"]


class InternLM3Config(LlamaConfig):
    """LLaMA's config under InternLM3's names."""

    model_type = "internlm3"
    attribute_map = {"qkv_bias": "attention_bias", "bias": "mlp_bias"}


class InternLM3ForCausalLM(LlamaForCausalLM):
    config_class = InternLM3Config
    config: InternLM3Config


class DeepseekConfig(LlamaConfig):
    """LLaMA's config plus DeepSeek-MoE's router and experts."""

    model_type = "deepseek"
    n_routed_experts: int | None = None
    n_shared_experts: int | None = None
    num_experts_per_tok: int | None = None
    moe_intermediate_size: int = 1407
    first_k_dense_replace: int = 0
    moe_layer_freq: int = 1
    norm_topk_prob: bool = False


class _Gate(nn.Module):
    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(config.initializer_range * torch.randn(config.n_routed_experts, config.hidden_size))


class DeepseekMoE(nn.Module):
    """Softmax over all experts in fp32, top k, optionally normalised, plus shared experts."""

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__()
        self.top_k, self.normalise = config.num_experts_per_tok, config.norm_topk_prob
        self.experts = nn.ModuleList(_mlp(config, config.moe_intermediate_size) for _ in range(config.n_routed_experts))
        self.gate = _Gate(config)
        self.shared_experts = (
            _mlp(config, config.moe_intermediate_size * config.n_shared_experts) if config.n_shared_experts else None
        )

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        x = hidden_states.reshape(-1, hidden_states.shape[-1])  # [tokens, H]
        scores = (x.float() @ self.gate.weight.float().T).softmax(-1)
        weights, chosen = scores.topk(self.top_k, dim=-1)
        if self.normalise:
            weights = weights / weights.sum(-1, keepdim=True)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            token, slot = (chosen == number).nonzero(as_tuple=True)
            if len(token):
                out = out.index_add(0, token, expert(x[token]) * weights[token, slot, None].to(x.dtype))
        if self.shared_experts is not None:
            out = out + self.shared_experts(x)
        return out.view_as(hidden_states)


def _mlp(config: PretrainedConfig, width: int) -> LlamaMLP:
    from copy import copy

    sized = copy(config)
    sized.intermediate_size = width
    return LlamaMLP(sized)


class DeepseekForCausalLM(LlamaForCausalLM):
    config_class = DeepseekConfig
    config: DeepseekConfig

    def __init__(self, config: DeepseekConfig) -> None:
        super().__init__(config)
        for index, layer in enumerate(self.model.layers):
            if config.n_routed_experts and index >= config.first_k_dense_replace and index % config.moe_layer_freq == 0:
                layer.mlp = DeepseekMoE(config)
        self.post_init()


def register() -> None:
    """Make AutoConfig and AutoModelForCausalLM build these classes. Safe to call twice."""
    classes: list[tuple[type[PretrainedConfig], type[PreTrainedModel]]] = [
        (MiMoConfig, MiMoForCausalLM),
        (DeepseekConfig, DeepseekForCausalLM),
    ]
    # transformers 5 has a config of its own for InternLM3, with LLaMA's model behind it.
    if "internlm3" not in CONFIG_MAPPING:
        classes.append((InternLM3Config, InternLM3ForCausalLM))
    for config_class, model_class in classes:
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        AutoModelForCausalLM.register(config_class, model_class, exist_ok=True)
