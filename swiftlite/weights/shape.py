"""`ModelShape`: the numbers of one model that weight rules refer to by name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from swiftlite.utils.errors import ConfigError
from swiftlite.utils.types import Config


@dataclass(frozen=True)
class LayerKind:
    """What a layer consists of. moe: experts. linear: linear attention. indexed: an indexer that chooses its tokens."""

    moe: bool = False
    linear: bool = False
    indexed: bool = False


NO_LAYER = LayerKind()


@dataclass(frozen=True)
class ModelShape:
    """Sizes of one model. Rules name these attributes as tensor dimensions.

    hidden = H, vocab = V, heads = query heads, groups = key/value heads, ffn = width of a dense MLP, moe_ffn = width of
    one expert, shared_ffn = width of all shared experts together, moe_layers[l] = layer l has experts, linear_layers[l] =
    it has linear attention (() = none has), of key_heads x key_dim and value_heads x value_dim, with a convolution over
    conv_kernel tokens. indexed_layers[l] = it has an indexer (() = none has), of index_heads x index_dim. num_labels =
    rows of a classifier's head (0 = there is no head, None = there is an output layer). Sizes that the model does not have
    are 0.
    """

    num_layers: int
    hidden: int
    vocab: int
    heads: int
    groups: int
    head_dim: int
    ffn: int
    moe_layers: tuple[bool, ...]
    experts: int = 0
    moe_ffn: int = 0
    shared_ffn: int = 0
    tied: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    shared_gate: bool = False
    expert_bias: bool = False
    mla: bool = False
    q_lora: int = 0
    kv_lora: int = 0
    nope_dim: int = 0
    rope_dim: int = 0
    v_dim: int = 0
    num_mtp: int = 0
    linear_layers: tuple[bool, ...] = ()
    key_heads: int = 0
    key_dim: int = 0
    value_heads: int = 0
    value_dim: int = 0
    conv_kernel: int = 0
    indexed_layers: tuple[bool, ...] = ()
    index_heads: int = 0
    index_dim: int = 0
    num_labels: int | None = None

    @property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """The kind of each decoder layer."""
        none = (False,) * len(self.moe_layers)
        return tuple(map(LayerKind, self.moe_layers, self.linear_layers or none, self.indexed_layers or none))

    @property
    def mtp_kind(self) -> LayerKind:
        """Of the layer in an MTP block: the last decoder layer's, with full attention."""
        return LayerKind(self.moe_layers[-1], indexed=any(self.indexed_layers))

    @property
    def q_rows(self) -> int:
        """Rows of the queries: heads x head_dim; under MLA heads x (nope + rope)."""
        return self.heads * (self.nope_dim + self.rope_dim if self.mla else self.head_dim)

    @property
    def gated_q_rows(self) -> int:
        """Rows of a q_proj that has a gate of the same size next to each query head."""
        return 2 * self.q_rows

    @property
    def kv_rows(self) -> int:
        return self.groups * self.head_dim

    @property
    def qkv_rows(self) -> int:
        return self.q_rows + 2 * self.kv_rows

    @property
    def attn_cols(self) -> int:
        """Columns of o_proj: heads x size of one value head."""
        return self.heads * (self.v_dim if self.mla else self.head_dim)

    @property
    def kv_down_rows(self) -> int:
        return self.kv_lora + self.rope_dim

    @property
    def kv_up_rows(self) -> int:
        return self.heads * (self.nope_dim + self.v_dim)

    @property
    def index_rows(self) -> int:
        """Rows of an indexer's queries."""
        return self.index_heads * self.index_dim

    @property
    def hidden2(self) -> int:
        return 2 * self.hidden

    @property
    def linear_keys(self) -> int:
        """Rows of the keys, and of the queries, of linear attention."""
        return self.key_heads * self.key_dim

    @property
    def linear_values(self) -> int:
        """Rows of its values, and of the gates of its output."""
        return self.value_heads * self.value_dim

    @property
    def linear_qkv(self) -> int:
        return 2 * self.linear_keys + self.linear_values

    @property
    def linear_qkvz(self) -> int:
        return self.linear_qkv + self.linear_values

    @property
    def value_heads2(self) -> int:
        return 2 * self.value_heads

    @property
    def ffn2(self) -> int:
        return 2 * self.ffn

    @property
    def homogeneous(self) -> bool:
        """All layers dense with full attention: Megatron stacks the layers of such a model into one tensor per name."""
        return not any(self.moe_layers) and not any(self.linear_layers)

    def dim(self, name: str | int) -> int:
        """The size that a dimension name stands for."""
        return name if isinstance(name, int) else int(getattr(self, name))

    @classmethod
    def from_config(cls, config: Config, num_mtp: int = 0) -> ModelShape:
        """Build from converted config fields (Megatron-LM names, see families/hf_config.py).

        Raises: ConfigError where sizes contradict each other.
        """
        get = config.get
        num_layers, heads = int(config["num_layers"]), int(config["num_attention_heads"])
        mla = bool(get("multi_latent_attention"))
        groups = heads if mla else int(get("num_query_groups") or heads)
        if heads % groups:
            raise ConfigError(
                f"num_attention_heads {heads} is not a multiple of num_key_value_heads {groups}; check config.json"
            )
        experts = int(get("num_experts") or 0)
        linear = layer_pattern(get("linear_attention_freq"), num_layers) if get("linear_attention_freq") else ()
        moe_layers = layer_pattern(get("moe_layer_freq"), num_layers) if experts else (False,) * num_layers
        return cls(
            num_layers=num_layers,
            hidden=int(config["hidden_size"]),
            vocab=int(config["padded_vocab_size"]),
            heads=heads,
            groups=groups,
            head_dim=int(get("kv_channels") or config["hidden_size"] // heads),
            ffn=int(get("ffn_hidden_size") or 0),
            moe_layers=moe_layers,
            experts=experts,
            moe_ffn=int(get("moe_ffn_hidden_size") or 0),
            shared_ffn=int(get("moe_shared_expert_intermediate_size") or 0),
            tied=not get("untie_embeddings_and_output_weights", True),
            qkv_bias=bool(get("add_qkv_bias")),
            qk_norm=bool(get("qk_layernorm")),
            shared_gate=bool(get("use_shared_expert_gate")),
            expert_bias=bool(get("moe_router_enable_expert_bias")),
            mla=mla,
            q_lora=int(get("q_lora_rank") or 0),
            kv_lora=int(get("kv_lora_rank") or 0) if mla else 0,
            nope_dim=int(get("qk_head_dim") or 0) if mla else 0,
            rope_dim=int(get("qk_pos_emb_head_dim") or 0) if mla else 0,
            v_dim=int(get("v_head_dim") or 0) if mla else 0,
            num_mtp=num_mtp,
            linear_layers=linear,
            key_heads=int(get("linear_num_key_heads") or 0),
            key_dim=int(get("linear_key_head_dim") or 0),
            value_heads=int(get("linear_num_value_heads") or 0),
            value_dim=int(get("linear_value_head_dim") or 0),
            conv_kernel=int(get("linear_conv_kernel_dim") or 0),
            indexed_layers=layer_pattern(get("dsa_indexer_layers"), num_layers) if get("dsa_indexer_layers") else (),
            index_heads=int(get("dsa_indexer_n_heads") or 0),
            index_dim=int(get("dsa_indexer_head_dim") or 0),
            num_labels=None if (labels := get("num_labels")) is None else int(labels),
        )


def layer_pattern(freq: str | int | Sequence[int] | None, num_layers: int) -> tuple[bool, ...]:
    """Read Megatron's moe_layer_freq: None or 1 = experts everywhere, N = every Nth layer, a 0/1 list or its text.

    The text form is what Megatron-LM's command line takes, `3`, `[0,1,1]` or `[0]*1+[1]*45`; nothing is evaluated as code.
    Raises: ConfigError for another text, or if the pattern does not have num_layers entries.
    """
    if isinstance(freq, str):
        freq = _parse_pattern(freq)
    if freq is None or isinstance(freq, int):
        return tuple(i % (freq or 1) == 0 for i in range(num_layers))
    if len(freq) != num_layers:
        raise ConfigError(f"moe_layer_freq {freq}: describes {len(freq)} layers, not {num_layers}; check config.json")
    return tuple(map(bool, freq))


def _parse_pattern(text: str) -> int | list[int]:
    plain = text.replace(" ", "")
    if plain.isdigit() and int(plain) > 0:
        return int(plain)
    pattern: list[int] = []
    for term in plain.removeprefix("(").removesuffix(")").split("+"):
        match = re.fullmatch(r"\(?\[([01](?:,[01])*)\]\)?(?:\*(\d+))?", term)
        if match is None:
            raise ConfigError(f"moe_layer_freq {text!r}: must be a number, a list like [0,1,1], or like [0]*1+[1]*45")
        pattern += [int(item) for item in match[1].split(",")] * int(match[2] or 1)
    return pattern
