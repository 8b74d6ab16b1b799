"""LoRA adapters derived from a bound map: one pair A [r, in], B [out, r] per Hugging Face weight, fused or not.

Names are Hugging Face's on both sides: `model.layers.0.self_attn.q_proj.lora_A.weight`. A Megatron adapter checkpoint is a
torch_dist checkpoint with these names as keys. Adapters that other Megatron tools wrote (one shared A under a fused
linear) are read too: A is repeated, B is divided by the base weight's own row gather.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from swiftlite.utils.errors import CheckpointError, ConfigError, MapError, ShapeError
from swiftlite.utils.types import Config, Json
from swiftlite.weights.dcp_file import TorchDistSource
from swiftlite.weights.ops import Shape
from swiftlite.weights.rule import BoundMap, Entry, clip, text_name
from swiftlite.weights.shape import ModelShape
from swiftlite.weights.storage import Extent, Files, TensorSpec, WeightSource, read_tensor
from swiftlite.weights.torch_dist import candidates

PEFT_PREFIX = "base_model.model."
A, B = ".lora_A.weight", ".lora_B.weight"
# What `all-linear` means, on both sides: every projection, neither routers nor the output layer.
ALL_LINEAR = (
    "q_proj", "k_proj", "v_proj", "o_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj",
    "gate_proj", "up_proj", "down_proj", "in_proj_qkvz", "in_proj_ba", "in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a",
    "out_proj",
)  # fmt: skip
# Keys of adapter_config.json that make it something else.
NOT_PLAIN = (
    "use_dora", "use_qalora", "use_bdlora", "fan_in_fan_out", "layer_replication", "alora_invocation_tokens", "arrow_config",
    "kasa_config", "velora_config", "monteclora_config",
)  # fmt: skip
# init_lora_weights that leave the base weights as they are.
PLAIN_BEGINNINGS = (None, True, False, "true", "false", "gaussian", "eva", "orthogonal")
MAX_RANK, MAX_ALPHA = 1 << 20, 1e6
_CHECKED_AT_ONCE = 1 << 24  # numbers of a tensor
EXPERT = re.compile(r"\.experts\.\d+\.(\w+)$")
FOREIGN = re.compile(r"(.+)\.lora_([AB])(?:\.default)?\.weight")


def check_beginning(config: Config, where: object) -> None:
    """Raises: ConfigError for an adapter whose training began by changing the base weights: PiSSA, OLoRA and their like."""
    kind = config.get("init_lora_weights")
    if (kind.lower() if isinstance(kind, str) else kind) not in PLAIN_BEGINNINGS:
        raise ConfigError(
            f"{where}: init_lora_weights {kind!r} changed the base weights as training began, so the adapter does not fit "
            "the base model; save it with peft's save_pretrained(path_initial_model_for_weight_conversion=...), which "
            "makes it plain LoRA"
        )


def check_stated(config: Config) -> None:
    """Raises: ConfigError for a kind, rank or alpha in adapter_config.json that no LoRA adapter has."""
    if config.get("peft_type", "LORA") != "LORA":
        raise ConfigError(f"adapter_config.json: peft_type {config['peft_type']!r} is not supported, only LORA is")
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, Mapping):
        raise ConfigError(f"adapter_config.json: alpha_pattern is {patterns!r}; it must be an object")
    rank = config.get("r")
    if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= MAX_RANK:
        raise ConfigError(f"adapter_config.json: r is {rank!r}; it must be a whole number from 1 to {MAX_RANK}")
    for key, alpha in (("lora_alpha", config.get("lora_alpha")), *patterns.items()):
        # beyond fp32's 1e38 the product overflows; no adapter is anywhere near this
        if not isinstance(alpha, int | float) or not abs(alpha) <= MAX_ALPHA:
            raise ConfigError(f"adapter_config.json: {key} is {alpha!r}; it must be a number up to {MAX_ALPHA:g}")
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ConfigError(
                f"adapter_config.json: alpha_pattern {pattern!r} is not a regular expression ({error})"
            ) from None


@dataclass(frozen=True)
class LoraConfig:
    """The part of adapter_config.json that decides what an adapter adds."""

    rank: int
    alpha: float
    use_rslora: bool = False
    alpha_pattern: Mapping[str, float] | None = None

    @classmethod
    def from_dict(cls, config: Config) -> LoraConfig:
        """Raises: ConfigError for kinds of adapters that are not plain LoRA."""
        check_beginning(config, "adapter_config.json")
        for key in NOT_PLAIN:
            if config.get(key) not in (None, False, "none", [], {}):
                raise ConfigError(f"adapter_config.json: {key} {config[key]!r} is not supported, only plain LoRA is")
        check_stated(config)
        return cls(
            config["r"], config["lora_alpha"], bool(config.get("use_rslora")), config.get("alpha_pattern") or None
        )

    def scale(self, module: str, rank: int) -> float:
        """Factor on B A for one module; its rank is A's, whatever rank_pattern says. The first alpha_pattern counts."""
        found = (a for p, a in (self.alpha_pattern or {}).items() if re.match(rf"(.*\.)?({p})$", module))
        alpha = next(found, self.alpha)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def initial_a(module: str, rank: int, into: int, seed: int) -> Tensor:
    """A [rank, into] of a new adapter, fp32, of peft's distribution: uniform within 1 / sqrt(into).

    It depends on seed and Hugging Face name alone, so it is the same on both sides and under every parallel layout.
    """
    digest = hashlib.sha256(f"{seed} {text_name(module)}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    bound = 1 / math.sqrt(into)
    return torch.empty(rank, into).uniform_(-bound, bound, generator=generator)


def check_adapter(bound: BoundMap, shapes: Mapping[str, Shape], where: str) -> None:
    """Hold adapter names (without PEFT's prefix) and shapes against the base model.

    Raises: MapError for an unknown or incomplete module, ShapeError for a matrix that does not fit.
    """
    for name, shape in shapes.items():
        module = name.removesuffix(A).removesuffix(B)
        weight = f"{module}.weight"
        if module == name or weight not in bound.by_hf:
            raise MapError(f"{name} in {where} belongs to no weight of this model; is it the adapter's base model?")
        for suffix in (A, B):
            if module + suffix not in shapes:
                raise MapError(f"{module}{suffix} is missing in {where}")
        entry, position = bound.by_hf[weight]
        out, into = entry.hf_shapes[position]
        rank = shapes[module + A][0]
        wanted = (rank, into) if name.endswith(A) else (out, rank)
        if tuple(shape) != wanted:
            raise ShapeError(f"{name} in {where} has shape {list(shape)}, the base model needs {list(wanted)}")


def check_values(source: WeightSource, names: Mapping[str, str], lora: LoraConfig, where: str) -> None:
    """Look at every tensor of an adapter, a block of rows at a time.

    Raises: CheckpointError naming the first one with NaN or infinite values, or of a scale that makes some.
    """
    with Files() as files:
        for name, stored in names.items():
            spec = source.spec(stored)
            factor = lora.scale(name.removesuffix(B), max(spec.shape[1], 1)) if name.endswith(B) else 1.0
            rows = spec.shape[0] if spec.shape else 1
            step = max(1, _CHECKED_AT_ONCE * rows // max(spec.numel, 1))
            for start in range(0, rows, step):
                block = read_tensor(source, stored, files, (start, min(start + step, rows)) if spec.shape else None)
                if not (block.float() * factor).isfinite().all():
                    raise CheckpointError(
                        f"{name} in {where} has values that are NaN or infinite; train or copy it again"
                    )


def unpack_experts(path: Path, model: ModelShape, lora: LoraConfig, target: Path) -> dict[str, tuple[int, float]]:
    """Write an adapter whose experts are packed, as peft does on transformers 5, with one pair per expert and projection.

    Packed: A [E r, in] and B [out, r E] on `experts` hold what A [r, in] and B [out, r] are for each of E experts, the
    expert being the slowest index of A's rows and the fastest of B's columns. gate and up have one pair together; where
    each of its ranks serves one of them only, as after peft itself packed two pairs, they are divided again.
    Returns: module -> (rank, factor on B A) of the whole adapter; {} if nothing is packed, and nothing is written.
    """
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    packed = [n for n in tensors if n.endswith((f".experts{A}", f".experts.base_layer{A}"))]
    if not packed:
        return {}
    pairs = {}
    for name in packed:
        a, b = tensors.pop(name), tensors.pop(name.removesuffix(A) + B)
        a, b = a.view(model.experts, -1, a.shape[1]), b.view(b.shape[0], -1, model.experts)
        fused = (a.shape[2], b.shape[0]) == (model.hidden, 2 * model.moe_ffn)
        pairs[name.removesuffix(A).removesuffix(".base_layer"), fused] = a, b
    divided = all(_serves_one_each(b) for (_, fused), (_, b) in pairs.items() if fused)
    facts: dict[str, tuple[int, float]] = {}
    for (experts, fused), (a, b) in pairs.items():
        rank, parts = a.shape[1], ("gate_proj", "up_proj") if fused else ("down_proj",)
        whole = f"{experts.removeprefix(PEFT_PREFIX)}.{'gate_up_proj' if fused else 'down_proj'}"
        own = rank // 2 if fused and divided else rank
        for expert in range(model.experts):
            for i, (part, rows) in enumerate(zip(parts, b[:, :, expert].chunk(len(parts)), strict=True)):
                mine = slice(i * own, (i + 1) * own) if own < rank else slice(None)
                tensors[f"{experts}.{expert}.{part}{A}"] = a[expert, mine].clone()
                tensors[f"{experts}.{expert}.{part}{B}"] = rows[:, mine].clone()
                facts[f"{experts}.{expert}.{part}".removeprefix(PEFT_PREFIX)] = own, lora.scale(whole, rank)
    for name, tensor in tensors.items():
        module = name.removesuffix(A).removeprefix(PEFT_PREFIX)
        if name.endswith(A) and module not in facts:
            facts[module] = tensor.shape[0], lora.scale(module, tensor.shape[0])
    save_file(tensors, target, {"format": "pt"})
    return facts


def _serves_one_each(b: Tensor) -> bool:
    """b [2 I, r, E]: the first half of the ranks reaches the first half of the rows only, the second the second."""
    rows, ranks = b.shape[0] // 2, b.shape[1] // 2
    return b.shape[1] % 2 == 0 and not b[:rows, ranks:].any() and not b[rows:, :ranks].any()


def describe(facts: Mapping[str, tuple[int, float]]) -> Json:
    """The keys of an adapter_config.json for modules with (rank, factor on B A).

    The experts' gate projection sets `r` and `lora_alpha`, since peft on transformers 5 packs experts by these alone.
    """
    values = {module: (rank, scale * rank) for module, (rank, scale) in facts.items()}
    groups: dict[str, set[tuple[int, float]]] = {}
    for module, value in values.items():
        groups.setdefault(_pattern(module, exact=False), set()).add(value)
    default = next((v for m, v in values.items() if EXPERT.search(m) and m.endswith("gate_proj")), None)
    default = default or next(iter(values.values()))
    ranks, alphas = {}, {}
    for module, value in sorted(values.items(), key=lambda item: not EXPERT.search(item[0])):
        pattern = _pattern(module, exact=False)
        if len(groups[pattern]) > 1:
            pattern = _pattern(module, exact=True)
        if value != default or EXPERT.search(module):  # an expert's pattern hides the shorter one of its projection
            ranks[pattern], alphas[pattern] = value
    exact_first = sorted(ranks, key=lambda p: "layers" not in p)
    return {
        "r": default[0],
        "lora_alpha": default[1],
        "use_rslora": False,
        "rank_pattern": {p: ranks[p] for p in exact_first},
        "alpha_pattern": {p: alphas[p] for p in exact_first},
        "target_modules": sorted({module.rpartition(".")[2] for module in values}),
        "target_parameters": None,
    }


def _pattern(module: str, exact: bool) -> str:
    """How peft's patterns name a module: its projection, or all of it; experts of a layer are one."""
    expert = EXPERT.search(module)
    if expert is None:
        return re.escape(module) if exact else module.rpartition(".")[2]
    before = re.escape(module[: expert.start() + 1]) if exact else ""
    return rf"{before}experts\.(\d+\.)?{expert[1]}"


class ForeignAdapter(WeightSource):
    """An adapter checkpoint under Megatron names, seen under Hugging Face's."""

    def __init__(self, source: TorchDistSource, bound: BoundMap) -> None:
        """Raises: MapError for a key that is not an adapter of this model."""
        self.source = source
        parts: dict[str, dict[str, str]] = {}
        for key in source.tensors:
            match = FOREIGN.fullmatch(key)
            if match is None:
                raise MapError(f"{key} in {source.directory} is not a LoRA tensor")
            parts.setdefault(f"{match[1]}.weight", {})[match[2]] = key
        self._found: dict[str, tuple[Entry, int, str, tuple[int, ...], tuple[int, ...]]] = {}
        used = set()
        for entry in bound.entries:
            slot = next((s for s in candidates(entry) if s.key in parts), None)
            if slot is None:
                continue
            used.add(slot.key)
            if not entry.rule.op.rows_only:
                raise MapError(f"{slot.key} in {source.directory}: an adapter on this weight cannot be read")
            for part in "AB":
                if part not in parts[slot.key]:
                    raise MapError(f"lora_{part} of {slot.key} is missing in {source.directory}")
            for position, weight in enumerate(entry.hf):
                for part, suffix in (("A", A), ("B", B)):
                    place = (entry, position, parts[slot.key][part], slot.index, slot.lead)
                    self._found[weight.removesuffix(".weight") + suffix] = place
        unknown = sorted(set(parts) - used)
        if unknown:
            raise MapError(f"{unknown[0]} in {source.directory} belongs to no weight of this model")

    @property
    def names(self) -> Collection[str]:
        return self._found

    @property
    def files(self) -> Sequence[Path]:
        return self.source.files

    def spec(self, name: str) -> TensorSpec:
        entry, position, key, _, lead = self._found[name]
        stored = self.source.spec(key)
        shape = stored.shape[len(lead) :]
        if name.endswith(B):
            shape = (entry.hf_shapes[position][0], shape[-1])
        return TensorSpec(stored.dtype, shape)

    def extents(self, name: str, start: int, stop: int) -> Iterator[Extent]:
        entry, position, key, index, lead = self._found[name]
        stored = self.source.spec(key)
        shape, flat = stored.shape[len(lead) :], 0
        for value, size in zip(index, lead, strict=True):
            flat = flat * size + value
        base = flat * math.prod(shape) * stored.dtype.itemsize
        if name.endswith(A):
            yield from self.source.extents(key, base + start, base + stop)
            return
        width = shape[-1] * stored.dtype.itemsize  # of one row of B
        assert start % width == 0 and stop % width == 0
        for segment in clip(entry.inverse(position), start // width, stop // width):
            first = base + segment.start * width
            yield from self.source.extents(key, first, first + segment.size * width)
