"""Rule blocks that families share: parts of weight maps and config rules. Data and one-line lambdas only."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from swiftlite.families.records import Config, ConfigRule, Derived, Refuse, Rules
from swiftlite.weights.ops import CONCAT, FUSED_QKV, QKV
from swiftlite.weights.rule import Condition, Duplicate, Fused, Source, WeightMap, WeightRule

DENSE = Condition("dense layer", lambda m, kind: not kind.moe)
MOE = Condition("MoE layer", lambda m, kind: kind.moe)
TIED = Condition("tied embeddings", lambda m, kind: m.tied)
SCORES = Condition("classifier", lambda m, kind: bool(m.num_labels))
UNTIED = Condition("untied embeddings", lambda m, kind: not m.tied and m.num_labels is None)
QKV_BIAS = Condition("qkv bias", lambda m, kind: m.qkv_bias)
HAS_QK_NORM = Condition("q/k norm", lambda m, kind: m.qk_norm)
SHARED = MOE & Condition("shared experts", lambda m, kind: m.shared_ffn > 0)
SHARED_GATE = SHARED & Condition("shared expert gate", lambda m, kind: m.shared_gate)
EXPERT_BIAS = MOE & Condition("expert bias", lambda m, kind: m.expert_bias)
Q_LORA = Condition("q_lora_rank", lambda m, kind: m.q_lora > 0)
NO_Q_LORA = Condition("no q_lora_rank", lambda m, kind: m.q_lora == 0)


def copy(mcore: str, hf: str, *dims: str | int, **settings: Any) -> WeightRule:
    """One tensor under two names. settings: as of WeightRule."""
    return WeightRule(mcore, (Source(hf, dims),), **settings)


def qkv(mcore: str, *, q: str, k: str, v: str) -> tuple[WeightRule, ...]:
    """Weight and, where the model has it, bias of linear_qkv: the rows of q, k and v by query group."""
    rows = ((q, "q_rows"), (k, "kv_rows"), (v, "kv_rows"))
    return (
        WeightRule(f"{mcore}.weight", tuple(Source(f"{name}.weight", (dim, "hidden")) for name, dim in rows), QKV),
        WeightRule(f"{mcore}.bias", tuple(Source(f"{name}.bias", (dim,)) for name, dim in rows), QKV, QKV_BIAS),
    )


def fused_qkv(mcore: str, hf: str) -> tuple[WeightRule, ...]:
    """linear_qkv of files that have q, k and v below each other in one tensor, weight and bias."""
    return (
        WeightRule(f"{mcore}.weight", (Source(f"{hf}.weight", ("qkv_rows", "hidden")),), FUSED_QKV),
        WeightRule(f"{mcore}.bias", (Source(f"{hf}.bias", ("qkv_rows",)),), FUSED_QKV, QKV_BIAS),
    )


def fused_experts(
    hf: str = "{layer}.mlp.experts", *, parts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
    gate_up: str = "gate_up_proj", down: str = "down_proj", transposed: bool = False, interleaved: bool = False,
    bias: bool = False, of_part: bool = False,
) -> tuple[Fused, ...]:  # fmt: skip
    """Files with all experts of a layer in two tensors, [E, 2I, H] and [E, H, I]; transposed: [E, H, 2I] and [E, I, H].

    interleaved: gate and up take turns, row by row or column by column. bias: the same of biases, [E, 2I] and [E, H].
    of_part: as of Fused.
    """
    gate_part, up_part, down_part = (f"{hf}.{{expert}}.{part}" for part in parts)
    return tuple(
        fused
        for stored, part in (("", ".weight"), ("_bias", ".bias"))[: 1 + bias]
        for fused in (
            Fused(
                f"{hf}.{gate_up}{stored}", (f"{gate_part}{part}", f"{up_part}{part}"), transposed, interleaved, of_part
            ),
            Fused(f"{hf}.{down}{stored}", (f"{down_part}{part}",), transposed, of_part=of_part),
        )
    )


def gated(mcore: str, *, gate: str, up: str, width: str, when: Condition) -> WeightRule:
    """linear_fc1 of a gated MLP: the rows of gate, then those of up."""
    halves = (Source(f"{gate}.weight", (width, "hidden")), Source(f"{up}.weight", (width, "hidden")))
    return WeightRule(f"{mcore}.weight", halves, CONCAT, when)


def gated_mlp(
    mcore: str,
    hf: str,
    width: str,
    when: Condition,
    gate: str = "gate_proj",
    up: str = "up_proj",
    down: str = "down_proj",
) -> tuple[WeightRule, ...]:
    """Both matrices of one gated MLP of that width."""
    return (
        gated(f"{mcore}.linear_fc1", gate=f"{hf}.{gate}", up=f"{hf}.{up}", width=width, when=when),
        copy(f"{mcore}.linear_fc2.weight", f"{hf}.{down}.weight", "hidden", width, when=when),
    )


# ---- weights ----


def decoder(
    *layer: tuple[WeightRule, ...], embedding: str = "model.embed_tokens", duplicates: tuple[Duplicate, ...] = (),
    **others: Any,
) -> WeightMap:  # fmt: skip
    """The map of a model with the usual final norm and head, and layers of these blocks.

    A classifier's score head takes the place of the output layer, under its name (as mcore-bridge has it), with a row
    for each label: no vocabulary, so it is never padded, and whole on every rank.
    others: `mtp`, `mtp_layer`, `fused`, `modules` and `live` of WeightMap.
    """
    top = (
        copy("embedding.word_embeddings.weight", f"{embedding}.weight", "vocab", "hidden"),
        copy("decoder.final_layernorm.weight", "model.norm.weight", "hidden"),
        copy("output_layer.weight", "lm_head.weight", "vocab", "hidden", when=UNTIED),
        copy("output_layer.weight", "score.weight", "num_labels", "hidden", when=SCORES),
    )
    head = Duplicate("lm_head.weight", of=f"{embedding}.weight", when=TIED)
    return WeightMap(top=top, layer=sum(layer, ()), duplicates=(head, *duplicates), **others)


ATTENTION_LINEAR = (
    *qkv(
        "{layer}.self_attention.linear_qkv",
        q="{layer}.self_attn.q_proj", k="{layer}.self_attn.k_proj", v="{layer}.self_attn.v_proj",
    ),
    copy("{layer}.self_attention.linear_proj.weight", "{layer}.self_attn.o_proj.weight", "hidden", "attn_cols"),
)  # fmt: skip
ATTENTION = (
    copy("{layer}.self_attention.linear_qkv.layer_norm_weight", "{layer}.input_layernorm.weight", "hidden"),
    *ATTENTION_LINEAR,
)
QK_NORM = (
    copy("{layer}.self_attention.q_layernorm.weight", "{layer}.self_attn.q_norm.weight", "head_dim", when=HAS_QK_NORM),
    copy("{layer}.self_attention.k_layernorm.weight", "{layer}.self_attn.k_norm.weight", "head_dim", when=HAS_QK_NORM),
)
# Of block full_qk_norm: one norm over all heads.
FULL_QK_NORM = (
    copy("{layer}.self_attention.q_layernorm.weight", "{layer}.self_attn.q_norm.weight", "q_rows"),
    copy("{layer}.self_attention.k_layernorm.weight", "{layer}.self_attn.k_norm.weight", "kv_rows"),
)
MLP_NORM = (
    copy("{layer}.mlp.linear_fc1.layer_norm_weight", "{layer}.post_attention_layernorm.weight", "hidden", when=DENSE),
)
MLP_LINEAR = gated_mlp("{layer}.mlp", "{layer}.mlp", "ffn", DENSE)
FUSED_MLP = (
    copy("{layer}.mlp.linear_fc1.weight", "{layer}.mlp.gate_up_proj.weight", "ffn2", "hidden", when=DENSE),
    copy("{layer}.mlp.linear_fc2.weight", "{layer}.mlp.down_proj.weight", "hidden", "ffn", when=DENSE),
)
MLP = (*MLP_NORM, *MLP_LINEAR)


def post_norms(attention: str, mlp: str) -> tuple[WeightRule, ...]:
    """Norms of block post_norms, by their Hugging Face names."""
    return (
        copy("{layer}.post_self_attn_layernorm.weight", f"{{layer}}.{attention}.weight", "hidden"),
        copy("{layer}.post_mlp_layernorm.weight", f"{{layer}}.{mlp}.weight", "hidden"),
    )


def router(hf: str, **settings: Any) -> tuple[WeightRule, ...]:
    """The norm before a layer's experts, and the router by its Hugging Face name. settings: of the router's rule."""
    return (
        copy("{layer}.pre_mlp_layernorm.weight", "{layer}.post_attention_layernorm.weight", "hidden", when=MOE),
        copy("{layer}.mlp.router.weight", f"{hf}.weight", "experts", "hidden", when=MOE, **settings),
    )


def expert_bias(hf: str) -> tuple[WeightRule, ...]:
    """What is added to the router's scores for choosing experts."""
    name, kept = "{layer}.mlp.router.expert_bias", {"when": EXPERT_BIAS, "keep_dtype": True, "is_buffer": True}
    return (copy(name, hf, "experts", **kept),)


ROUTER = router("{layer}.mlp.gate")
ROUTER_BIAS = expert_bias("{layer}.mlp.gate.e_score_correction_bias")
EXPERTS = gated_mlp("{layer}.mlp.experts.experts", "{layer}.mlp.experts.{expert}", "moe_ffn", MOE)
# Mixtral's names, router included.
MIXTRAL_EXPERTS = (
    *router("{layer}.block_sparse_moe.gate"),
    *gated_mlp(
        "{layer}.mlp.experts.experts", "{layer}.block_sparse_moe.experts.{expert}", "moe_ffn", MOE, "w1", "w3", "w2"
    ),
)
SHARED_EXPERTS = gated_mlp("{layer}.mlp.shared_experts", "{layer}.mlp.shared_experts", "shared_ffn", SHARED)

_SELF, _HF_SELF = "{layer}.self_attention", "{layer}.self_attn"
MLA_ATTENTION = (
    copy("{layer}.input_layernorm.weight", "{layer}.input_layernorm.weight", "hidden"),
    copy(f"{_SELF}.linear_q_proj.weight", f"{_HF_SELF}.q_proj.weight", "q_rows", "hidden", when=NO_Q_LORA),
    copy(f"{_SELF}.linear_q_down_proj.weight", f"{_HF_SELF}.q_a_proj.weight", "q_lora", "hidden", when=Q_LORA),
    copy(f"{_SELF}.linear_q_up_proj.layer_norm_weight", f"{_HF_SELF}.q_a_layernorm.weight", "q_lora", when=Q_LORA),
    copy(f"{_SELF}.linear_q_up_proj.weight", f"{_HF_SELF}.q_b_proj.weight", "q_rows", "q_lora", when=Q_LORA),
    copy(f"{_SELF}.linear_kv_down_proj.weight", f"{_HF_SELF}.kv_a_proj_with_mqa.weight", "kv_down_rows", "hidden"),
    copy(f"{_SELF}.linear_kv_up_proj.layer_norm_weight", f"{_HF_SELF}.kv_a_layernorm.weight", "kv_lora"),
    copy(f"{_SELF}.linear_kv_up_proj.weight", f"{_HF_SELF}.kv_b_proj.weight", "kv_up_rows", "kv_lora"),
    copy(f"{_SELF}.linear_proj.weight", f"{_HF_SELF}.o_proj.weight", "hidden", "attn_cols"),
)


def next_layer_mtp(norm: str = "shared_head.norm", embedding: str = "model.embed_tokens") -> dict[str, Any]:
    """MTP blocks that follow the decoder layers under the next layer numbers (deepseek_v3, glm4_moe). Their layer has the
    kind of the last decoder layer; embedding and head are copies of the main ones. norm: the name of the last one.
    """
    return {
        "mtp": (
            copy("{layer}.enorm.weight", "{layer}.enorm.weight", "hidden"),
            copy("{layer}.hnorm.weight", "{layer}.hnorm.weight", "hidden"),
            copy("{layer}.eh_proj.weight", "{layer}.eh_proj.weight", "hidden", "hidden2"),
            copy("{layer}.final_layernorm.weight", f"{{layer}}.{norm}.weight", "hidden"),
        ),
        "mtp_layer": "model.layers.{number}",
        "duplicates": (
            Duplicate("{layer}.embed_tokens.weight", of=f"{embedding}.weight"),
            Duplicate("{layer}.shared_head.head.weight", of="lm_head.weight"),
        ),
    }


# ---- config: HF key -> Megatron-LM argument, in the order in which a converted config lists them ----

# What configs call the number of routed experts of a layer, and of those that a token visits.
EXPERT_KEYS = ("num_experts", "n_routed_experts", "moe_num_experts", "num_local_experts")
TOPK_KEYS = ("num_experts_per_tok", "moe_topk", "moe_k")


def rotary_base(default: float | None = None) -> ConfigRule:
    """rope_theta, a whole number as an int. default: what the class in transformers assumes, where not 10000."""
    return ConfigRule("rotary_base", ("rope_theta",), lambda v: int(v) if v == int(v) else float(v), default)


def _is_not_causal(config: Config) -> bool:
    names = config.get("architectures") or ()
    return any(not str(name).endswith(("ForCausalLM", "LMHeadModel")) for name in names[:1])


def activation(key: str) -> Refuse:
    """The function on the gate of MLPs by this key is one that can be computed."""
    return Refuse(
        lambda c: c.get(key, "silu") not in ("silu", "gelu_pytorch_tanh"),
        f"{key} {{{key}!r}} is not 'silu' or 'gelu_pytorch_tanh'; only MLPs that are gated by these are supported",
    )


NO_WINDOW = Refuse(
    lambda c: c.get("use_sliding_window") or "sliding_attention" in (c.get("layer_types") or ()),
    "it uses sliding window attention, which transformers' class of this architecture does not compute",
)
ONE_ROPE = Refuse(
    lambda c: "window_rope" in c,
    "it has rope settings by kind of layer, which transformers' class of this architecture does not compute",
)
PARTIAL_ROTARY_CONFIG: Rules = (
    activation("hidden_act"),
    NO_WINDOW,
    ONE_ROPE,
    Refuse(lambda c: c.get("mlp_bias"), "mlp_bias true is not supported"),
    Refuse(_is_not_causal, "{architectures[0]} is not a causal language model"),
    ConfigRule("num_layers", ("num_hidden_layers",), small=4),
    ConfigRule("hidden_size", ("hidden_size",)),
    ConfigRule("ffn_hidden_size", ("intermediate_size",), small=128),
    ConfigRule("num_attention_heads", ("num_attention_heads",)),
    ConfigRule("num_query_groups", ("num_key_value_heads", "num_attention_heads")),
    ConfigRule("max_position_embeddings", ("max_position_embeddings",), small=256),
    ConfigRule("norm_epsilon", ("rms_norm_eps",), default=1e-6),
    rotary_base(),
    ConfigRule("padded_vocab_size", ("vocab_size",), small=515),
    ConfigRule("attention_dropout", ("attention_dropout",)),
    ConfigRule("untie_embeddings_and_output_weights", ("tie_word_embeddings",), lambda v: not v, default=True),
    ConfigRule("swiglu", ("hidden_act",), lambda v: True),
    ConfigRule("activation", ("hidden_act",), lambda v: None if v == "silu" else v),
    ConfigRule("add_qkv_bias", ("attention_bias", "qkv_bias", "use_bias"), default=False),
    ConfigRule("disable_bias_linear", ("mlp_bias",), lambda v: not v),
    ConfigRule("kv_channels", ("head_dim",), small=32),
    ConfigRule("architectures", ("architectures",)),
    ConfigRule("moe_ffn_hidden_size", ("moe_intermediate_size",), small=32),
    ConfigRule("moe_shared_expert_intermediate_size", ("shared_expert_intermediate_size",), small=48),
    ConfigRule("moe_router_topk", TOPK_KEYS, small=3),
    ConfigRule("num_experts", EXPERT_KEYS, small=8),
    ConfigRule("moe_router_pre_softmax", ("norm_topk_prob",), lambda v: not v),
    ConfigRule("q_lora_rank", ("q_lora_rank",), small=32),
    ConfigRule("kv_lora_rank", ("kv_lora_rank",), small=32),
    Derived("multi_latent_attention", lambda c: True if c.get("kv_lora_rank") else None),
    ConfigRule("qk_head_dim", ("qk_nope_head_dim",), small=16),
    ConfigRule("qk_pos_emb_head_dim", ("qk_rope_head_dim",), small=16),
    ConfigRule("v_head_dim", ("v_head_dim",), small=16),
    ConfigRule("moe_router_topk_scaling_factor", ("routed_scaling_factor",)),
    ConfigRule("qk_layernorm", ("use_qk_norm",)),
    ConfigRule("rope_scaling", ("rope_scaling",)),
    ConfigRule("partial_rotary_factor", ("partial_rotary_factor",)),
    ConfigRule("original_max_position_embeddings", ("original_max_position_embeddings",)),
)
# Of the architectures whose classes in transformers rotate whole heads: they ignore the factor or fail over it.
GPT_CONFIG: Rules = (
    *PARTIAL_ROTARY_CONFIG,
    Refuse(
        lambda c: (
            c.get("partial_rotary_factor") not in (None, 1)
            and (c.get("rope_scaling") or {}).get("rope_type") != "proportional"
        ),
        "partial_rotary_factor {partial_rotary_factor}: this architecture rotates whole heads",
    ),
)


def _dense_first(config: Config, default: int | None = None) -> str | None:
    dense = config.get("first_k_dense_replace", default)
    return None if dense is None else f"[0]*{dense}+[1]*{config['num_hidden_layers'] - dense}"


def layer_list(marked: Iterable[bool]) -> str:
    """A list with 1 for each layer that is marked and 0 for others, in the form of Megatron's arguments."""
    return f"[{','.join(str(int(layer)) for layer in marked)}]"


def _sparse_step(config: Config) -> str:
    """Qwen's pattern: experts where (layer + 1) % decoder_sparse_step == 0, except mlp_only_layers."""
    step, dense = config.get("decoder_sparse_step", 1), config.get("mlp_only_layers") or ()
    return layer_list((i + 1) % step == 0 and i not in dense for i in range(config["num_hidden_layers"]))


EXPERTS_HAVE_THE_WIDTH = Derived("moe_ffn_hidden_size", lambda c: c["intermediate_size"])


def constant(field: str, value: Any) -> Derived:
    """What an architecture fixes without a key in its config."""
    return Derived(field, lambda c: value)


SIGMOID_ROUTER: Rules = (
    Refuse(
        lambda c: c.get("norm_topk_prob") is False,
        "norm_topk_prob false with a sigmoid router is not expressible: Megatron always normalises",
    ),
    constant("moe_router_score_function", "sigmoid"),
)
_FIRST_DENSE = {"first_k_dense_replace": 2}
DENSE_FIRST = Derived("moe_layer_freq", _dense_first, _FIRST_DENSE)


def dense_by_types(default: int = 1) -> Derived:
    """The dense layers that mlp_layer_types names, or the first ones, as many as first_k_dense_replace says."""

    def layers(config: Config) -> str | None:
        types = config.get("mlp_layer_types")
        return layer_list(kind == "sparse" for kind in types) if types else _dense_first(config, default)

    return Derived("moe_layer_freq", layers, _FIRST_DENSE)


SPARSE_STEP = Derived("moe_layer_freq", _sparse_step)
EXPERT_BIAS_ON = constant("moe_router_enable_expert_bias", True)


def shared_width(key: str, default: int = 0) -> Derived:
    """Of all shared experts together, whose number stands under this key."""
    return Derived(
        "moe_shared_expert_intermediate_size",
        lambda c: (c.get(key, default) or 0) * c["moe_intermediate_size"] or None,
        {key: 2},
    )


SHARED_WIDTH = shared_width("n_shared_experts")
# Softmax routers whose Hugging Face class does not normalise unless told to.
NORM_TOPK_DEFAULT_FALSE = Derived("moe_router_pre_softmax", lambda c: not c.get("norm_topk_prob", False))
REFUSE_OUTPUT_BIAS = Refuse(
    lambda c: c.get("attention_bias"),
    "attention_bias true puts a bias on o_proj, which Megatron's attention does not have",
)


# Granite's factors, of block multipliers. Its classes' factor on attention scores is 1, not one over the root of a head.
MULTIPLIERS: Rules = (
    ConfigRule("softmax_scale", ("attention_multiplier",), default=1.0),
    ConfigRule("embedding_multiplier", ("embedding_multiplier",)),
    ConfigRule("residual_multiplier", ("residual_multiplier",)),
    ConfigRule("logits_scaling", ("logits_scaling",)),
)

# ---- DeepSeek and Ernie ----

MLA_CONFIG: Rules = (
    Refuse(
        lambda c: c.get("attention_bias"),
        "attention_bias true puts biases on latent projections, which Megatron's MLA does not have",
    ),
    constant("qk_layernorm", True),
)
SEQ_AUX_LOSS = constant("moe_router_load_balancing_type", "seq_aux_loss")
# Two of four groups of four experts, of which a token visits four: two scores rank a group, as Hugging Face has it.
SMALL_GROUPS = {"n_group": 4, "topk_group": 2, "n_routed_experts": 16, "num_experts_per_tok": 4}
EXPERT_GROUPS = (
    Derived("moe_router_num_groups", lambda c: c.get("n_group") if (c.get("n_group") or 1) > 1 else None, SMALL_GROUPS),
    Derived("moe_router_group_topk", lambda c: c.get("topk_group") if (c.get("n_group") or 1) > 1 else None),
)


def _dense_first_every(config: Config) -> str | None:
    """DeepSeek's pattern: experts from first_k_dense_replace on, in every moe_layer_freq-th layer."""
    every = config.get("moe_layer_freq") or 1
    if every == 1:
        return _dense_first(config)
    dense = config.get("first_k_dense_replace") or 0
    return layer_list(i >= dense and i % every == 0 for i in range(config["num_hidden_layers"]))


DENSE_FIRST_EVERY = Derived("moe_layer_freq", _dense_first_every, _FIRST_DENSE)
