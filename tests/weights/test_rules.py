"""The engine's algebra: gathers, clips, inverses, binding and coverage, on whatever shapes."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from swiftlite.utils.errors import ConfigError, MapError, ShapeError
from swiftlite.weights.ops import CONCAT, COPY, FLATTEN, FUSED_QKV, GATED_QKV, QKV, SWAP_HALVES, Op, Take
from swiftlite.weights.rule import BoundMap, Entry, Source, WeightMap, WeightRule, clip
from swiftlite.weights.shape import ModelShape, layer_pattern

MODEL = ModelShape(
    num_layers=3, hidden=10, vocab=33, heads=6, groups=3, head_dim=4, ffn=14, moe_layers=(False, True, True),
    experts=3, moe_ffn=6, linear_layers=(True, True, False), key_heads=2, key_dim=3, value_heads=4, value_dim=5,
)  # fmt: skip


def entry_of(op: Op, *shapes: tuple[int, ...]) -> Entry:
    sources = tuple(Source(f"s{i}", shape) for i, shape in enumerate(shapes))
    return WeightMap(top=(WeightRule("out", sources, op),), layer=()).bind(MODEL).entries[0]


def gather(entry: Entry, tensors: list[torch.Tensor]) -> torch.Tensor:
    flat = [t.reshape(-1, entry.row_size) for t in tensors]
    return torch.cat([flat[s.source][s.start : s.start + s.size] for s in entry.segments]).reshape(entry.shape)


CASES = {
    "copy": (COPY, (7, 5)),
    "copy_1d": (COPY, (7,)),
    "concat": (CONCAT, (14, 10), (14, 10)),
    "qkv": (QKV, (24, 10), (12, 10), (12, 10)),
    "qkv_bias": (QKV, (24,), (12,), (12,)),
    "qkv_lora_b": (QKV, (24, 2), (12, 2), (12, 2)),
    "fused_qkv": (FUSED_QKV, (48, 10)),
    "fused_qkv_lora_b": (FUSED_QKV, (48, 2)),
    "gated_qkv": (GATED_QKV, (48, 10), (12, 10), (12, 10)),
    "swap": (SWAP_HALVES, (5, 8)),
    "flatten": (FLATTEN, (1, 9)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_the_inverse_gives_every_input_back(case: str, dtype: torch.dtype) -> None:
    op, *shapes = CASES[case]
    entry = entry_of(op, *shapes)
    tensors = [torch.randint(-99, 99, s).to(dtype) for s in shapes]
    out = gather(entry, tensors).reshape(-1, entry.row_size)
    for i, tensor in enumerate(tensors):
        back = torch.cat([out[s.start : s.start + s.size] for s in entry.inverse(i)]).reshape(tensor.shape)
        assert torch.equal(back, tensor)


def test_qkv_is_grouped_as_megatron_reads_it() -> None:
    """Against the formula of megatron-core's attention: [groups, heads per group + 2, head_dim, hidden]."""
    q, k, v = torch.randn(24, 10), torch.randn(12, 10), torch.randn(12, 10)
    expected = torch.cat([q.view(3, 8, 10), k.view(3, 4, 10), v.view(3, 4, 10)], dim=1).reshape(48, 10)
    assert torch.equal(gather(entry_of(QKV, (24, 10), (12, 10), (12, 10)), [q, k, v]), expected)
    assert torch.equal(gather(entry_of(FUSED_QKV, (48, 10)), [torch.cat([q, k, v])]), expected)


def test_gates_follow_the_queries_of_their_group() -> None:
    """Against transformers' view of q_proj, [heads, (query, gate), head_dim], and megatron-core's split by group."""
    q, k, v = torch.randn(48, 10), torch.randn(12, 10), torch.randn(12, 10)
    queries, gates = q.view(6, 2, 4, 10).unbind(1)
    parts = [x.reshape(3, -1, 10) for x in (queries, gates, k, v)]
    expected = torch.cat(parts, dim=1).reshape(72, 10)
    assert torch.equal(gather(entry_of(GATED_QKV, (48, 10), (12, 10), (12, 10)), [q, k, v]), expected)


PARTS = ("linear_keys", "linear_keys", "linear_values", "linear_values")


def taking(parts: tuple[int, ...], blocks: str | int = "key_heads") -> BoundMap:
    """One input of 2 x 6 + 2 x 20 rows, of which a rule each takes one of `parts`."""
    source = (Source("x", (52, 10)),)
    rules = tuple(WeightRule(f"part{i}", source, Take(i, PARTS, blocks)) for i in parts)
    return WeightMap(top=rules, layer=()).bind(MODEL)


@pytest.mark.parametrize("blocks", [1, "key_heads"])
def test_one_tensor_feeds_several(blocks: str | int) -> None:
    """Against transformers' view of in_proj_qkvz: [key heads, q + k + values per key head + as many gates]."""
    x, bound = torch.randn(52, 10), taking((0, 1, 2, 3), blocks)
    sizes = [6, 6, 20, 20] if blocks == 1 else [3, 3, 10, 10]
    split = x.view(-1, sum(sizes), 10).split(sizes, dim=1)
    for entry, expected in zip(bound.entries, split, strict=True):
        assert torch.equal(gather(entry, [x]), expected.reshape(-1, 10))
    assert [entry.label for entry in bound.groups[0]] == ["part0", "part1", "part2", "part3"]
    assert bound.by_hf["x"] == (bound.entries[0], 0) and len(bound.uses["x"]) == 4


def test_rows_that_several_rules_take_are_each_taken_once() -> None:
    with pytest.raises(MapError, match="x is claimed twice: by part1 and by part1b"):
        source = (Source("x", (52, 10)),)
        rules = [WeightRule(name, source, Take(int(name[4]), PARTS)) for name in ("part0", "part1", "part1b", "part2")]
        WeightMap(top=tuple(rules), layer=()).bind(MODEL)
    with pytest.raises(AssertionError, match="row 6 of x is not used"):
        taking((0, 2, 3), 1)
    with pytest.raises(AssertionError, match="rows of x are left over"):
        taking((0, 1, 2), 1)


def test_swap_exchanges_column_halves() -> None:
    x = torch.randn(5, 8)
    assert torch.equal(gather(entry_of(SWAP_HALVES, (5, 8)), [x]), torch.cat([x[:, 4:], x[:, :4]], dim=1))


def test_clip_cuts_any_range_of_a_gather() -> None:
    segments = entry_of(QKV, (24,), (12,), (12,)).segments
    rows = [(s.source, s.start + i) for s in segments for i in range(s.size)]
    for start, stop in itertools.combinations(range(0, 49, 3), 2):
        cut = [(s.source, s.start + i) for s in clip(segments, start, stop) for i in range(s.size)]
        assert cut == rows[start:stop]


def test_two_rules_cannot_claim_one_tensor() -> None:
    rules = (WeightRule("a", (Source("x", (2,)),)), WeightRule("b", (Source("x", (2,)),)))
    with pytest.raises(MapError, match="x is claimed twice: by a and by b"):
        WeightMap(top=rules, layer=()).bind(MODEL)


def _map() -> BoundMap:
    layer = (
        WeightRule("{layer}.norm", (Source("{layer}.norm", ("hidden",)),)),
        WeightRule("{layer}.w1", (Source("{layer}.e.{expert}.g", ("moe_ffn", "hidden")),)),
    )
    return WeightMap(top=(WeightRule("emb", (Source("emb", ("vocab", "hidden")),)),), layer=layer).bind(MODEL)


def test_coverage_is_checked_both_ways_and_by_shape() -> None:
    bound = _map()
    shapes = {name: e.hf_shapes[i] for name, (e, i) in bound.by_hf.items()}
    assert len(shapes) == 1 + 3 * (1 + 3)
    coverage = bound.check({**shapes, "model.layers.0.rotary_emb.inv_freq": (4,)}, "here")
    assert coverage.ignored == ("model.layers.0.rotary_emb.inv_freq",)
    missing = {k: v for k, v in shapes.items() if k != "model.layers.1.norm"}
    with pytest.raises(MapError, match="1 missing tensor: model.layers.1.norm"):
        bound.check(missing, "here")
    with pytest.raises(MapError, match="1 unknown tensor: extra"):
        bound.check({**shapes, "extra": (1,)}, "here")
    with pytest.raises(ShapeError, match=r"emb in here has shape \[34, 10\], but config.json makes it \[33, 10\]"):
        bound.check({**shapes, "emb": (34, 10)}, "here")


@pytest.mark.parametrize(
    ("freq", "layers", "expected"),
    [
        (None, 3, "111"), (1, 3, "111"), (2, 5, "10101"), ("2", 4, "1010"), ("[0]*1+[1]*3", 4, "0111"),
        ("[0,1]*2", 4, "0101"), ([0, 1, 1], 3, "011"), ("([0]*2+[1]*1)", 3, "001"),
    ],
)  # fmt: skip
def test_layer_patterns(freq: object, layers: int, expected: str) -> None:
    assert layer_pattern(freq, layers) == tuple(c == "1" for c in expected)


def test_layer_pattern_of_wrong_length_or_text() -> None:
    with pytest.raises(ConfigError, match="describes 3 layers, not 4"):
        layer_pattern([0, 1, 1], 4)
    with pytest.raises(ConfigError, match="must be a number, a list"):
        layer_pattern("[0]*x", 4)


def test_heads_must_divide_into_groups() -> None:
    config = {
        "num_layers": 1,
        "hidden_size": 8,
        "num_attention_heads": 4,
        "num_query_groups": 3,
        "padded_vocab_size": 9,
    }
    with pytest.raises(ConfigError, match="4 is not a multiple of num_key_value_heads 3"):
        ModelShape.from_config(config)


def test_shape_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        MODEL.hidden = 3  # type: ignore[misc]
