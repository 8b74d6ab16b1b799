"""Qwen3.5 and 3.6, dense: Qwen3-Next's layers with a tensor for each input projection of a delta net."""

from __future__ import annotations

from swiftlite.families.blocks import MLP, PARTIAL_ROTARY_CONFIG, copy, decoder
from swiftlite.families.qwen3_next import GATED_ATTENTION, HYBRID, MTP, QKV_PARTS, delta_net, parts
from swiftlite.families.records import Family

_IN, _HF = "{layer}.self_attention.in_proj.weight", "{layer}.linear_attn.in_proj"
DELTA_NET = delta_net(
    *parts(_IN, f"{_HF}_qkv.weight", QKV_PARTS, "linear_qkv", "hidden"),
    copy(f"{_IN}.z", f"{_HF}_z.weight", "linear_values", "hidden"),
    copy(f"{_IN}.beta", f"{_HF}_b.weight", "value_heads", "hidden"),
    copy(f"{_IN}.alpha", f"{_HF}_a.weight", "value_heads", "hidden"),
)

FAMILY = Family(
    "qwen3_5",
    architectures=("Qwen3_5ForCausalLM",),
    wrappers={"Qwen3_5ForConditionalGeneration": ("qwen3_5_text",)},
    config=PARTIAL_ROTARY_CONFIG,
    patches=HYBRID,
    blocks=("gated_delta_net",),
    mtp_key="mtp_num_hidden_layers",
    mtp_default=1,
    weights=decoder(DELTA_NET, GATED_ATTENTION, MLP, **MTP),
)
