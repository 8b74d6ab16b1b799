"""A model written as stock Megatron-LM's command line: one explicit, ordered table of (flag, attribute, rule).

It is the model's part alone, true to the numbers. Nothing in swiftlite reads it back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from swiftlite.arguments.description import Described
from swiftlite.families import family_of
from swiftlite.utils.types import Json

if TYPE_CHECKING:
    from swiftlite.arguments.parallel import MegatronArguments


@dataclass(frozen=True)
class Row:
    """One flag. Its value: `rule(args)` if there is one, else the attribute, else `fallback` where that is None.

    None and False leave the flag out, True writes it bare, a list writes each item, all else is `str(value)`.
    """

    flag: str
    attribute: str | None = None
    rule: Callable[[Described], object] | None = None
    fallback: object = None

    def value(self, args: Described) -> object:
        if self.rule is not None:
            return self.rule(args)
        value = None if self.attribute is None else getattr(args, self.attribute, None)
        return self.fallback if value is None else value

    def words(self, args: Described) -> list[str]:
        value = self.value(args)
        if value is None or value is False:
            return []
        if value is True:
            return [self.flag]
        return [self.flag, *map(str, value if isinstance(value, list) else [value])]


def same(*flags: str) -> tuple[Row, ...]:
    """Flags whose attribute has the same name."""
    return tuple(Row(flag, flag[2:].replace("-", "_")) for flag in flags)


def fixed(flag: str, value: object) -> Row:
    return Row(flag, fallback=value)


def off(flag: str, attribute: str) -> Row:
    """A flag that switches off what `attribute` says is on."""
    return Row(flag, rule=lambda args: not getattr(args, attribute))


def _when(condition: Callable[[Described], object], *rows: Row) -> tuple[Row, ...]:
    """Rows that count only under a condition."""

    def guarded(row: Row) -> Row:
        return Row(row.flag, rule=lambda args: row.value(args) if condition(args) else None)

    return tuple(guarded(row) for row in rows)


def _is_moe(args: Described) -> bool:
    return bool(args.num_experts)


def _is_mla(args: Described) -> bool:
    return bool(args.multi_latent_attention)


def _rope(kind: str) -> Callable[[Described], bool]:
    return lambda args: args.rope_type == kind


def _rope_value(key: str) -> Callable[[Described], Any]:
    return lambda args: (args.rope_scaling or {}).get(key)


STOCK: tuple[Row, ...] = (
    *same("--num-layers", "--hidden-size", "--ffn-hidden-size", "--num-attention-heads"),
    Row("--group-query-attention", rule=lambda args: (args.num_query_groups or 1) > 1 and not _is_mla(args)),
    *_when(lambda args: not _is_mla(args), *same("--num-query-groups", "--kv-channels")),
    *same("--max-position-embeddings", "--seq-length"),
    fixed("--position-embedding-type", "rope"),
    Row("--rotary-base", rule=lambda args: _whole(args.rotary_base or 10000)),
    *_when(lambda args: not _is_mla(args), Row("--rotary-percent", "partial_rotary_factor", fallback=1.0)),
    *same("--rotary-interleaved", "--no-rope-freq"),
    *_when(
        _rope("llama3"), fixed("--use-rope-scaling", True), Row("--rope-scaling-factor", rule=_rope_value("factor"))
    ),
    *_when(
        _rope("linear"),
        Row("--rotary-seq-len-interpolation-factor", rule=lambda args: int(_rope_value("factor")(args))),
    ),
    off("--no-rope-fusion", "apply_rope_fusion"),
    fixed("--normalization", "RMSNorm"),
    Row("--apply-layernorm-1p", "layernorm_zero_centered_gamma"),
    *same("--norm-epsilon"),
    Row("--swiglu", rule=lambda args: args.swiglu and args.activation == "silu"),
    Row("--quick-geglu", rule=lambda args: args.swiglu and args.activation == "quick_gelu"),
    *_when(lambda args: args.glu_linear_offset, *same("--glu-linear-offset")),
    *same("--activation-func-clamp-value", "--untie-embeddings-and-output-weights", "--disable-bias-linear"),
    *same("--add-qkv-bias", "--attention-dropout", "--hidden-dropout", "--init-method-std", "--qk-layernorm"),
    Row("--make-vocab-size-divisible-by", "padded_vocab_size"),
    fixed("--transformer-impl", "transformer_engine"),
    Row("--window-size", rule=lambda args: None if args.window_size is None else f"({args.window_size},0)"),
    *same("--window-attn-skip-freq"),
    *_when(lambda args: args.softmax_type != "vanilla", *same("--softmax-type")),
    *same("--attention-softmax-in-fp32", "--mtp-num-layers", "--bf16", "--fp16"),
    *_when(
        _is_moe,
        *same("--num-experts", "--moe-layer-freq", "--moe-ffn-hidden-size", "--moe-shared-expert-intermediate-size"),
        Row("--moe-shared-expert-gate", "use_shared_expert_gate"),
        *same("--moe-router-topk", "--moe-router-pre-softmax", "--moe-router-dtype", "--moe-router-score-function"),
        *same("--moe-router-enable-expert-bias"),
        Row("--moe-router-bias-update-rate", rule=lambda args: 0.0 if args.moe_router_enable_expert_bias else None),
        *same("--moe-router-num-groups", "--moe-router-group-topk", "--moe-router-topk-scaling-factor"),
        *same("--moe-router-load-balancing-type", "--moe-aux-loss-coeff", "--moe-token-dispatcher-type"),
        fixed("--moe-grouped-gemm", True),
    ),
    *_when(
        _is_mla,
        *same("--multi-latent-attention", "--q-lora-rank", "--kv-lora-rank", "--qk-head-dim"),
        *same("--qk-pos-emb-head-dim", "--v-head-dim"),
        Row("--rope-type", rule=lambda args: "yarn" if args.rope_type == "yarn" else "rope"),
        *_when(
            _rope("yarn"),
            Row("--rotary-scaling-factor", rule=_rope_value("factor")),
            Row("--mscale", rule=_rope_value("mscale")),
            Row("--mscale-all-dim", rule=_rope_value("mscale_all_dim")),
        ),
    ),
)


def _whole(value: float) -> float:
    return int(value) if value == int(value) else value


# Blocks of families without which stock Megatron-LM computes something else; None where settings tell whether it does.
STOCK_LACKS: dict[str, str | None] = {
    "no_input_norms": "layers without norms before attention and MLP",
    "scaled_embedding": "factor on embeddings",
    "expert_biases": None,  # stock's own have them, too
    "group_router": None,
    "multipliers": None,
    "soft_caps": None,
    "softmax_bias_router": None,
    "window_rope": None,
    "post_norms": "norms behind attention and MLP",
    "full_qk_norm": "norms of queries and keys over all heads together",
    "qk_norm_after_rope": "norms of queries and keys after their rotation",
    "gated_delta_net": "gated delta nets whose output norm has plain weights next to norms of 1 + weight",
    "position_factor": "queries that grow with the position",
    "chunked_attention": "attention within chunks",
}


def _stock_limit(args: Described) -> str | None:
    """Why stock Megatron-LM cannot compute this model, or None. Judged by settings and blocks."""
    scaling, rope = args.rope_scaling or {}, args.rope_type
    if args.num_labels is not None:
        return "it has no such models that classify, or have no output layer"
    if args.softmax_scale is not None:
        return f"it has no argument for the scale of attention scores; this model has {args.softmax_scale}"
    if args.window_rope is not None:
        return "it has one set of rotary settings; this model has others in layers with a window"
    if args.attn_logit_softcapping is not None or args.final_logit_softcapping is not None:
        return "it has no argument for caps on attention scores or logits"
    if args.activation == "gelu_pytorch_tanh":
        return f"it has no argument for MLPs that are gated by {args.activation}"
    for name in ("embedding_multiplier", "residual_multiplier", "logits_scaling"):
        if getattr(args, name) != 1:
            return f"it has no {name}; this model has {getattr(args, name)}"
    for block in family_of(args.architectures).blocks if args.architectures else ():
        lacking = STOCK_LACKS.get(block, f"layer like {block}")
        if lacking:
            return f"it has no {lacking}"
    if args.rotary_base and args.rotary_base != int(args.rotary_base):
        return f"its --rotary-base takes whole numbers; this model has rope_theta {args.rotary_base}"
    if rope in ("llama3", "linear") and _is_mla(args):
        return f"it has no arguments for {rope} rotary scaling with latent attention"
    if rope == "llama3":
        wanted = {"low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 8192}
        for key, value in wanted.items():
            if scaling.get(key, value) != value:
                return f"its llama3 rotary scaling fixes {key} at {value}; this model has {scaling[key]}"
    elif rope == "linear":
        if float(scaling["factor"]) != int(scaling["factor"]):
            return f"its linear rotary scaling takes whole factors; this model has {scaling['factor']}"
    elif rope == "yarn" and _is_mla(args):
        wanted = {"beta_fast": 32, "beta_slow": 1, "original_max_position_embeddings": 4096}
        for key, value in wanted.items():
            if scaling.get(key, value) != value:
                return f"it has no argument for yarn's {key} (fixed at {value}); this model has {scaling[key]}"
    elif rope != "default":
        return f"it has no arguments for {rope} rotary scaling with this attention"
    if args.moe_router_enable_expert_bias and args.moe_router_score_function == "softmax":
        return "its router refuses an expert bias with softmax scores"
    if args.moe_router_group_topk:
        if args.moe_router_score_function == "softmax":
            return "its router ranks expert groups by a sum of scores; this model ranks them by the largest score"
        if (args.moe_router_topk or 0) // args.moe_router_group_topk != 2:
            return "its router ranks expert groups by the sum of topk // group_topk scores; this model sums 2"
    if _is_mla(args) and args.norm_epsilon != 1e-6:
        return f"it has one norm epsilon ({args.norm_epsilon}); the norms of this model's latents use 1e-6"
    return None


def megatron_lm_args(args: MegatronArguments) -> list[str] | str:
    """The model's arguments for stock Megatron-LM (core 0.16 and later), or one line that says why there are none.

    Numerically true: partial rotation, rotary scaling and an expert bias that stays fixed are in them. Used with
    `--load DIR --finetune --no-load-optim --no-load-rng --dist-ckpt-strictness log_unexpected` and a tokenizer.
    `--make-vocab-size-divisible-by` gives the checkpoint's rows at TP 1; at TP N divide it by N.
    """
    both = Described(args.description, args)
    limit = _stock_limit(both)
    if limit is not None:
        return f"Stock Megatron-LM cannot compute this model: {limit}. Train it with `swiftlite megatron sft`."
    return [word for row in STOCK for word in row.words(both)]


# Where Megatron-LM keeps a flag's value under another name, and what the flag means there.
_STORED: dict[str, tuple[str, Callable[[object], object]]] = {
    "--disable-bias-linear": ("add_bias_linear", lambda value: not value),
    "--no-rope-fusion": ("apply_rope_fusion", lambda value: not value),
}


def checkpoint_args(args: MegatronArguments) -> Json:
    """Megatron-LM's argument namespace for this model as plain values, as a checkpoint carries it.

    What stock Megatron-LM compares or takes over with `--use-checkpoint-args`; parallel sizes are 1, as torch_dist
    checkpoints are independent of them. What does not apply to the model is absent.
    """
    both = Described(args.description, args)
    stored: Json = {}
    for row in STOCK:
        name, change = _STORED.get(row.flag, (row.flag[2:].replace("-", "_"), lambda value: value))
        value = row.value(both)
        if value is not None:
            stored[name] = change(value)
    stored["moe_layer_freq"] = both.moe_layer_pattern if _is_moe(both) else 1
    stored.update(
        padded_vocab_size=both.padded_vocab_size,
        add_position_embedding=True,
        use_rotary_position_embeddings=False,
        apply_query_key_layer_scaling=False,
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        virtual_pipeline_model_parallel_size=None,
        expert_model_parallel_size=1,
        context_parallel_size=1,
        data_parallel_random_init=False,
        ckpt_format="torch_dist",
        consumed_train_samples=0,
        consumed_valid_samples=0,
    )
    return stored
