"""Reference models for architectures that transformers knows only through remote code: MiMo, DeepSeek-MoE, Ling 2.0, and
InternLM3 before transformers 5.

They are used where a Hugging Face side is needed to compare with (the precision check, tests); remote code itself runs
only with --trust_remote_code true. Tensor names are those of the published checkpoints.
"""

from __future__ import annotations

from typing import Any

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
from transformers.models.glm4_moe.configuration_glm4_moe import Glm4MoeConfig
from transformers.models.glm4_moe.modeling_glm4_moe import (
    Glm4MoeAttention,
    Glm4MoeDecoderLayer,
    Glm4MoeForCausalLM,
    Glm4MoeModel,
)
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP


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
    expert_bias: torch.Tensor  # Ling's

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(config.initializer_range * torch.randn(config.n_routed_experts, config.hidden_size))


class DeepseekMoE(nn.Module):
    """Softmax over all experts in fp32, top k, optionally normalised, plus shared experts."""

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__()
        self.config = config
        self.experts = nn.ModuleList(_mlp(config, config.moe_intermediate_size) for _ in range(config.n_routed_experts))
        self.gate = _Gate(config)
        self.shared_experts = (
            _mlp(config, config.moe_intermediate_size * config.n_shared_experts) if config.n_shared_experts else None
        )

    def route(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [tokens, E] -> weights and indices of the chosen experts [tokens, K]."""
        weights, chosen = logits.softmax(-1).topk(self.config.num_experts_per_tok, dim=-1)
        return weights / weights.sum(-1, keepdim=True) if self.config.norm_topk_prob else weights, chosen

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        x = hidden_states.reshape(-1, hidden_states.shape[-1])  # [tokens, H]
        weights, chosen = self.route(x.float() @ self.gate.weight.float().T)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            token, slot = (chosen == number).nonzero(as_tuple=True)
            if len(token):
                out = out.index_add(0, token, expert(x[token]) * weights[token, slot, None].to(x.dtype))
        if self.shared_experts is not None:
            out = out + self.shared_experts(x)
        return out.view_as(hidden_states)


def _mlp(config: PretrainedConfig, width: int) -> Qwen2MLP:
    from copy import copy

    sized = copy(config)
    sized.intermediate_size = width
    return Qwen2MLP(sized)


class DeepseekForCausalLM(LlamaForCausalLM):
    config_class = DeepseekConfig
    config: DeepseekConfig

    def __init__(self, config: DeepseekConfig) -> None:
        super().__init__(config)
        for index, layer in enumerate(self.model.layers):
            if config.n_routed_experts and index >= config.first_k_dense_replace and index % config.moe_layer_freq == 0:
                layer.mlp = DeepseekMoE(config)
        self.post_init()


class BailingMoeV2Config(Glm4MoeConfig):
    """GLM-4.5's config under Ling's names."""

    model_type = "bailing_moe"
    attribute_map = {
        **Glm4MoeConfig.attribute_map,
        "num_experts": "n_routed_experts",
        "num_shared_experts": "n_shared_experts",
        "use_qkv_bias": "attention_bias",
    }


class _Called:
    """A module of a base class under the name that the checkpoints have for it."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, owner: Any, _: type) -> Any:
        return getattr(owner, self.name)


class _Rows:
    """A projection whose rows are part number `part` of query_key_value."""

    def __init__(self, part: int) -> None:
        self.part = part

    def __get__(self, owner: Any, _: type) -> Any:
        return lambda x: owner.query_key_value(x).split(owner.rows, -1)[self.part]


class BailingAttention(Glm4MoeAttention):
    """GLM-4.5's attention with q, k and v below each other in one matrix."""

    q_proj: Any = _Rows(0)
    k_proj: Any = _Rows(1)
    v_proj: Any = _Rows(2)
    o_proj: Any = _Called("dense")
    q_norm: Any = _Called("query_layernorm")
    k_norm: Any = _Called("key_layernorm")

    def __init__(self, config: BailingMoeV2Config, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        parts: list[Any] = [self._modules.pop(f"{part}_proj") for part in "qkv"]
        self.rows = [part.out_features for part in parts]
        self.query_key_value = nn.Linear(config.hidden_size, sum(self.rows), bias=config.attention_bias)
        self.dense = self._modules.pop("o_proj")
        if config.use_qk_norm:
            self.query_layernorm, self.key_layernorm = (self._modules.pop(f"{part}_norm") for part in "qk")


class BailingMoE(DeepseekMoE):
    """Sigmoids plus a correction bias choose among the best groups; the sigmoids, normalised and scaled, weigh."""

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)
        self.gate.register_buffer("expert_bias", torch.zeros(config.n_routed_experts))

    def route(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scores = logits.sigmoid()
        choice = (scores + self.gate.expert_bias).view(len(scores), self.config.n_group, -1)
        best = choice.topk(2, -1).values.sum(-1).topk(self.config.topk_group, -1).indices
        allowed = torch.zeros(choice.shape[:2], dtype=torch.bool).scatter(1, best, True).unsqueeze(-1)
        among = choice.masked_fill(~allowed, -torch.inf).flatten(1)
        chosen = among.topk(self.config.num_experts_per_tok, -1).indices
        weights = scores.gather(1, chosen)
        return weights / weights.sum(-1, keepdim=True) * self.config.routed_scaling_factor, chosen


class BailingLayer(Glm4MoeDecoderLayer):
    self_attn: Any = _Called("attention")


class BailingModel(Glm4MoeModel):
    embed_tokens: Any = _Called("word_embeddings")


class BailingMoeV2ForCausalLM(Glm4MoeForCausalLM):
    config_class = BailingMoeV2Config
    config: BailingMoeV2Config

    def __init__(self, config: BailingMoeV2Config) -> None:
        super().__init__(config)
        self.model.__class__ = BailingModel
        self.model.word_embeddings = self.model._modules.pop("embed_tokens")
        for index, layer in enumerate(self.model.layers):
            layer.__class__ = BailingLayer
            del layer._modules["self_attn"]
            layer.attention = BailingAttention(config, index)
            if index >= config.first_k_dense_replace:
                layer.mlp = BailingMoE(config)
        self.post_init()


def register() -> None:
    """Make AutoConfig and AutoModelForCausalLM build these classes. Safe to call twice."""
    classes: list[tuple[type[PretrainedConfig], type[PreTrainedModel]]] = [
        (MiMoConfig, MiMoForCausalLM),
        (DeepseekConfig, DeepseekForCausalLM),
        (BailingMoeV2Config, BailingMoeV2ForCausalLM),
    ]
    # transformers 5 has a config of its own for InternLM3, with LLaMA's model behind it.
    if "internlm3" not in CONFIG_MAPPING:
        classes.append((InternLM3Config, InternLM3ForCausalLM))
    for config_class, model_class in classes:
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        AutoModelForCausalLM.register(config_class, model_class, exist_ok=True)
