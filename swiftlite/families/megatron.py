"""The Megatron side of the model registry: views generated from the families, so they cannot disagree with them.

Functions are named by path (`package.module:function`), since resolving some of them imports megatron-core.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from swiftlite.families import MODEL_MAPPING, families
from swiftlite.utils.errors import UsageError

# The order in which ms-swift lists its types; types that are registered later follow.
_ORDER = (
    "qwen2", "qwen2_5", "qwq", "qwq_preview", "qwen2_5_math", "llama", "llama3", "llama3_1", "llama3_2",
    "longwriter_llama3_1", "codefuse_codellama", "marco_o1", "deepseek", "deepseek_r1_distill", "yi", "yi_coder", "sus",
    "skywork_o1", "openbuddy_llama", "openbuddy_llama3", "megrez", "reflection", "numina", "ziya", "mengzi3", "qwen3",
    "qwen3_thinking", "qwen2_moe", "qwen3_moe", "qwen3_moe_thinking", "internlm3", "mimo", "mimo_rl", "moonlight",
    "deepseek_moe", "deepseek_v2", "deepseek_v2_5", "deepseek_r1", "dots1", "ernie", "glm4_5",
)  # fmt: skip


@dataclass(frozen=True)
class MegatronModelMeta:
    """How models of some types are built and converted."""

    megatron_model_type: str
    model_types: tuple[str, ...]
    model_provider: str = "swiftlite.megatron.model.provider:model_provider"
    convert_hf_config: str = "swiftlite.checkpoint.bind:convert_hf_config"
    convert_mcore2hf: str = "swiftlite.convert.export:convert_mcore2hf"
    convert_hf2mcore: str = "swiftlite.convert.export:convert_hf2mcore"
    extra_args_provider: str | None = None


class _MegatronView(Mapping[str, MegatronModelMeta]):
    """megatron model type -> MegatronModelMeta; every type here is a GPT."""

    def __getitem__(self, key: str) -> MegatronModelMeta:
        if key != "gpt":
            raise KeyError(key)
        supported = {a for family in families() for a in family.architectures}
        types = [t for t, meta in MODEL_MAPPING.items() if supported & set(meta.architectures)]
        known = [t for t in _ORDER if t in types]
        return MegatronModelMeta("gpt", (*known, *(t for t in types if t not in _ORDER)))

    def __iter__(self) -> Iterator[str]:
        return iter(("gpt",))

    def __len__(self) -> int:
        return 1


class _TypeView(Mapping[str, str]):
    """model type -> megatron model type."""

    def __getitem__(self, key: str) -> str:
        if key not in MEGATRON_MODEL_MAPPING["gpt"].model_types:
            raise KeyError(key)
        return "gpt"

    def __iter__(self) -> Iterator[str]:
        return iter(MEGATRON_MODEL_MAPPING["gpt"].model_types)

    def __len__(self) -> int:
        return len(MEGATRON_MODEL_MAPPING["gpt"].model_types)


MEGATRON_MODEL_MAPPING: Mapping[str, MegatronModelMeta] = _MegatronView()
MODEL_META_MAPPING: Mapping[str, str] = _TypeView()


def get_megatron_model_meta(model_type: str) -> MegatronModelMeta:
    """The Megatron side of a model type. Raises: UsageError if it has none."""
    if model_type not in MODEL_META_MAPPING:
        raise UsageError(
            f"model type {model_type!r} has no Megatron side; supported are {', '.join(MODEL_META_MAPPING)}"
        )
    return MEGATRON_MODEL_MAPPING[MODEL_META_MAPPING[model_type]]
