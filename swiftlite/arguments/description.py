"""ModelDescription: a model in Megatron-LM's words, as config.json describes it. No torch."""

from __future__ import annotations

import functools
import typing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from swiftlite.arguments.parser import convert
from swiftlite.utils.errors import ConfigError
from swiftlite.utils.types import Config, Json

if TYPE_CHECKING:
    from swiftlite.arguments.parallel import MegatronArguments
from swiftlite.weights.shape import layer_pattern


@dataclass(frozen=True)
class ModelDescription:
    """What TransformerConfig and Megatron-LM's arguments need to know of a model; a default holds where config.json is
    silent. Names are Megatron-LM's.

    num_query_groups: key/value heads. kv_channels: width of a head. padded_vocab_size: rows of the embedding.
    layernorm_zero_centered_gamma: norms multiply with 1 + weight. softmax_scale: on the scores of attention; None: one
    over the root of a head's width. softmax_type: 'learnable' for attention with sinks. attn_logit_softcapping,
    final_logit_softcapping: bounds of attention scores and logits.
    attention_output_gate: what attention gives is multiplied with gates. linear_attention_freq: layers that are gated delta
    nets, a pattern; linear_*: their heads, the heads' widths, and the tokens that their convolution sees.
    window_size: tokens before its own that one sees in the layers of window_attn_skip_freq, a pattern like that of
    moe_layer_freq; without it in all. window_rope: rope settings of these, where they have others, rope_theta among them.
    activation: on the gate of a gated MLP. glu_linear_offset: added to its other half. activation_func_clamp_value: bound
    of both. embedding_multiplier, residual_multiplier: factors on embeddings and on what layers add; logits_scaling: what
    logits are divided by.
    rotary_interleaved: rotary pairs are neighbours instead of halves. partial_rotary_factor: share of a head that
    rotates. no_rope_freq: layers that do not rotate, a pattern. rope_scaling: as config.json spells it.
    attention_chunk_size: layers that rotate see the chunk of so many tokens that they are in. attn_temperature: `scale` and
    `floor` of the others' queries. qk_norm_of_rotated: rotated queries and keys have norms without weights.
    moe_apply_probs_on_input: the router's scores multiply what experts get, not what they give.
    moe_layer_freq: which layers have experts, every N-th, or like [0]*1+[1]*45. moe_router_topk: experts of a token.
    Latent attention: ranks and widths of a head's parts. dsa_indexer_topk: tokens that an indexer chooses for each token's
    attention, in the layers of the pattern dsa_indexer_layers; others take the choice of the layer before.
    num_labels: of a classifier, whose score head takes the place of the output layer; 0: there is nothing in that place;
    None: it is a language model.
    """

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int = 1
    kv_channels: int | None = None
    max_position_embeddings: int | None = None
    padded_vocab_size: int | None = None
    norm_epsilon: float = 1e-5
    layernorm_zero_centered_gamma: bool = False
    qk_layernorm: bool = False
    softmax_scale: float | None = None
    window_size: int | None = None
    window_attn_skip_freq: str | None = None
    window_rope: Json | None = None
    softmax_type: str = "vanilla"
    attention_output_gate: bool = False
    linear_attention_freq: str | None = None
    linear_conv_kernel_dim: int | None = None
    linear_key_head_dim: int | None = None
    linear_value_head_dim: int | None = None
    linear_num_key_heads: int | None = None
    linear_num_value_heads: int | None = None
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_scaling: float = 1.0
    swiglu: bool = True
    activation: str = "silu"
    glu_linear_offset: float = 0.0
    activation_func_clamp_value: float | None = None
    untie_embeddings_and_output_weights: bool = True
    disable_bias_linear: bool = True
    add_qkv_bias: bool = True
    attention_dropout: float = 0.0
    hidden_dropout: float = 0.0
    init_method_std: float = 0.02
    rotary_base: float = 10000
    rotary_interleaved: bool = False
    partial_rotary_factor: float | None = None
    no_rope_freq: str | None = None
    rope_scaling: Json | None = None
    original_max_position_embeddings: int | None = None
    architectures: str | None = None

    attention_chunk_size: int | None = None
    attn_temperature: Json | None = None
    qk_norm_of_rotated: bool = False

    num_experts: int | None = None
    moe_layer_freq: str = "1"
    moe_ffn_hidden_size: int | None = None
    moe_shared_expert_intermediate_size: int | None = None
    use_shared_expert_gate: bool = False
    moe_router_topk: int = 2
    moe_router_score_function: str = "softmax"
    moe_router_pre_softmax: bool = False
    moe_apply_probs_on_input: bool = False
    moe_router_topk_scaling_factor: float | None = None
    moe_router_enable_expert_bias: bool = False
    moe_router_load_balancing_type: str = "aux_loss"
    moe_router_num_groups: int | None = None
    moe_router_group_topk: int | None = None

    multi_latent_attention: bool = False
    q_lora_rank: int | None = None
    kv_lora_rank: int = 32
    qk_head_dim: int = 128
    qk_pos_emb_head_dim: int = 64
    v_head_dim: int | None = None
    dsa_indexer_n_heads: int | None = None
    dsa_indexer_head_dim: int | None = None
    dsa_indexer_topk: int | None = None
    dsa_indexer_layers: str | None = None

    num_labels: int | None = None

    @classmethod
    def of(cls, config: Config) -> ModelDescription:
        """From the converted config, as `convert_hf_config` returns it. Raises: ConfigError for unknown names."""
        hints = _hints()
        unknown = sorted(set(config) - set(hints))
        if unknown:
            raise ConfigError(f"the model's config sets {', '.join(unknown)}, which ModelDescription does not have")
        made = cls(**{name: convert(value, hints[name], name) for name, value in config.items()})
        changes: Json = {}
        if made.moe_ffn_hidden_size is None and made.num_experts is not None:
            changes["moe_ffn_hidden_size"] = made.ffn_hidden_size
        if made.moe_shared_expert_intermediate_size == 0:
            changes["moe_shared_expert_intermediate_size"] = None
        if made.rope_scaling and "type" in made.rope_scaling and "rope_type" not in made.rope_scaling:
            changes["rope_scaling"] = {**made.rope_scaling, "rope_type": made.rope_scaling["type"]}
        return replace(made, **changes)

    @property
    def moe_layer_pattern(self) -> list[int]:
        """1 for each layer with experts, 0 for each dense one. Length `num_layers`."""
        if not self.num_experts:
            return [0] * self.num_layers
        return [int(moe) for moe in layer_pattern(self.moe_layer_freq, self.num_layers)]

    @property
    def rope_type(self) -> str:
        """'default', 'linear', 'dynamic', 'llama3', 'yarn', ..."""
        scaling = self.rope_scaling or {}
        return str(scaling.get("rope_type") or scaling.get("type") or "default")


@functools.cache
def _hints() -> Json:
    return typing.get_type_hints(ModelDescription)


# What a user may set over config.json: settings of a training, which other tools keep in the config.
OVERRIDES = ("attention_dropout", "hidden_dropout", "moe_router_load_balancing_type")

# Flags of Megatron-LM that are read from config.json instead.
READ_FROM_CONFIG = (*(name for name in ModelDescription.__annotations__ if name not in (*OVERRIDES, "num_labels")),
                    "apply_query_key_layer_scaling")  # fmt: skip


class Described:
    """A description and the settings of a run, read as one: what Megatron-LM keeps in one namespace."""

    def __init__(self, model: ModelDescription, settings: MegatronArguments) -> None:
        self.model, self.settings = model, settings

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model if hasattr(self.model, name) else self.settings, name)
