"""DeepSeek-V3.2: V3 whose layers have an indexer, which chooses the tokens that each token sees.

On Megatron all are seen, which is the same while a text has no more tokens than are chosen; the indexer is carried.
"""

from __future__ import annotations

from swiftlite.families.blocks import (
    EXPERT_BIAS_ON,
    EXPERT_GROUPS,
    GPT_CONFIG,
    MLA_CONFIG,
    SHARED_WIDTH,
    SIGMOID_ROUTER,
    copy,
    decoder,
    dense_by_types,
    layer_list,
    next_layer_mtp,
)
from swiftlite.families.deepseek_v3 import LAYER
from swiftlite.families.records import ConfigRule, Derived, Family, Refuse
from swiftlite.weights.rule import Condition, WeightRule

INDEXED = Condition("layer with an indexer", lambda m, kind: kind.indexed)


def _indexer(mcore: str, hf: str, *dims: str, keep_dtype: bool = False) -> WeightRule:
    name = f"{{layer}}.self_attention.core_attention.indexer.{mcore}"
    return copy(name, f"{{layer}}.self_attn.indexer.{hf}", *dims, when=INDEXED, keep_dtype=keep_dtype, carried=True)


INDEXER = (
    _indexer("linear_wq_b.weight", "wq_b.weight", "index_rows", "q_lora"),
    _indexer("linear_wk.weight", "wk.weight", "index_dim", "hidden"),
    _indexer("k_norm.weight", "k_norm.weight", "index_dim"),
    _indexer("k_norm.bias", "k_norm.bias", "index_dim"),
    _indexer("linear_weights_proj.weight", "weights_proj.weight", "index_heads", "hidden", keep_dtype=True),
)
PATCHES = (
    Refuse(lambda c: not c.get("q_lora_rank"), "its indexers read the queries' latents, and q_lora_rank is not given"),
    *MLA_CONFIG,
    *SIGMOID_ROUTER,
    dense_by_types(3),
    EXPERT_BIAS_ON,
    *EXPERT_GROUPS,
    SHARED_WIDTH,
    ConfigRule("dsa_indexer_n_heads", ("index_n_heads",), small=3),
    ConfigRule("dsa_indexer_head_dim", ("index_head_dim",), small=32),
    ConfigRule("dsa_indexer_topk", ("index_topk",), default=2048),
)
WEIGHTS = decoder(*LAYER, INDEXER, **next_layer_mtp())

FAMILY = Family(
    "deepseek_v32",
    architectures=("DeepseekV32ForCausalLM",),
    config=GPT_CONFIG,
    patches=(*PATCHES, Derived("dsa_indexer_layers", lambda c: layer_list([True] * c["num_hidden_layers"]))),
    blocks=("group_router",),
    weights=WEIGHTS,
)
