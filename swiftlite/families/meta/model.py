"""Registry records of Hugging Face models. Dataclasses only; functions are named by path and resolved in llm/."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Model:
    """One published checkpoint: its ids on the two hubs."""

    ms_model_id: str | None = None
    hf_model_id: str | None = None
    model_path: str | None = None
    ms_revision: str | None = None
    hf_revision: str | None = None


@dataclass(frozen=True)
class ModelGroup:
    """Checkpoints that share requirements and download filters."""

    models: tuple[Model, ...]
    ignore_patterns: tuple[str, ...] | None = None
    requires: tuple[str, ...] | None = None
    tags: tuple[str, ...] = ()


@dataclass(frozen=True)
class ModelMeta:
    """A model type: which checkpoints it covers, how they are loaded, which chat template they use."""

    model_type: str
    model_groups: tuple[ModelGroup, ...]
    template: str | None = None
    get_function: str = "swiftlite.llm.model.loader:get_model_tokenizer_with_flash_attn"
    model_arch: str | None = None
    architectures: tuple[str, ...] = ()
    additional_saved_files: tuple[str, ...] = ()
    torch_dtype: str | None = None
    is_multimodal: bool = False
    is_reward: bool = False
    task_type: str | None = None
    ignore_patterns: tuple[str, ...] | None = None
    requires: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()

    @property
    def models(self) -> tuple[Model, ...]:
        return tuple(m for group in self.model_groups for m in group.models)


@dataclass
class ModelInfo:
    """What one checkpoint directory says about itself. `config`: config.json as a dict; `torch_dtype`: a torch.dtype."""

    model_type: str | None
    model_dir: str
    torch_dtype: Any = None
    max_model_len: int | None = None
    quant_method: str | None = None
    quant_bits: int | None = None
    rope_scaling: dict[str, Any] | None = None
    is_moe_model: bool = False
    config: dict[str, Any] | None = None
    task_type: str | None = None
    num_labels: int | None = None
    explanation: str = field(default="", repr=False)


def ids(*pairs: tuple[str | None, str | None] | str) -> tuple[Model, ...]:
    """`(ms_id, hf_id)` pairs, or one string where both hubs use the same id."""
    return tuple(Model(p, p) if isinstance(p, str) else Model(*p) for p in pairs)
