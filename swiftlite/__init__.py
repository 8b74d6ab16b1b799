"""swiftlite: fine-tune language models on Hugging Face or Megatron-core, and convert between the two.

The names below are the Python interface; each is imported when it is first used, so that `import swiftlite` loads
neither torch nor transformers. Commands take an arguments object or the words one would type: `["--model", "DIR"]`;
swiftlite.api has objects in their place.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from swiftlite import moved as moved

__version__ = "0.1.0"

if TYPE_CHECKING:
    from swiftlite.checkpoint.checkpoint import Checkpoint
    from swiftlite.checkpoint.registry import get_model_info_meta
    from swiftlite.cli.export import convert_hf2mcore, convert_mcore2hf, export_main
    from swiftlite.families import register_family, register_model
    from swiftlite.families.templates import register_template
    from swiftlite.llm.dataset.register import register_dataset
    from swiftlite.llm.infer import infer_main
    from swiftlite.llm.model.loader import get_model_processor, get_model_tokenizer
    from swiftlite.llm.template.loss_scale import register_loss_scale
    from swiftlite.llm.template.register import get_template
    from swiftlite.llm.train.dpo import dpo_main
    from swiftlite.llm.train.sft import pt_main, sft_main
    from swiftlite.megatron.trainers.dpo import megatron_dpo_main
    from swiftlite.megatron.trainers.sft import megatron_pt_main, megatron_sft_main
    from swiftlite.train.plugins import Callback, register_callback, register_objective, register_optimizer

_WHERE = {
    "Callback": "swiftlite.train.plugins",
    "Checkpoint": "swiftlite.checkpoint.checkpoint",
    "convert_hf2mcore": "swiftlite.cli.export",
    "convert_mcore2hf": "swiftlite.cli.export",
    "dpo_main": "swiftlite.llm.train.dpo",
    "export_main": "swiftlite.cli.export",
    "get_model_info_meta": "swiftlite.checkpoint.registry",
    "get_model_processor": "swiftlite.llm.model.loader",
    "get_model_tokenizer": "swiftlite.llm.model.loader",
    "get_template": "swiftlite.llm.template.register",
    "infer_main": "swiftlite.llm.infer",
    "megatron_dpo_main": "swiftlite.megatron.trainers.dpo",
    "megatron_pt_main": "swiftlite.megatron.trainers.sft",
    "megatron_sft_main": "swiftlite.megatron.trainers.sft",
    "pt_main": "swiftlite.llm.train.sft",
    "sft_main": "swiftlite.llm.train.sft",
    "register_callback": "swiftlite.train.plugins",
    "register_dataset": "swiftlite.llm.dataset.register",
    "register_family": "swiftlite.families",
    "register_loss_scale": "swiftlite.llm.template.loss_scale",
    "register_model": "swiftlite.families",
    "register_objective": "swiftlite.train.plugins",
    "register_optimizer": "swiftlite.train.plugins",
    "register_template": "swiftlite.families.templates",
}

__all__ = [
    "Callback",
    "Checkpoint",
    "__version__",
    "convert_hf2mcore",
    "convert_mcore2hf",
    "dpo_main",
    "export_main",
    "get_model_info_meta",
    "get_model_processor",
    "get_model_tokenizer",
    "get_template",
    "infer_main",
    "megatron_dpo_main",
    "megatron_pt_main",
    "megatron_sft_main",
    "pt_main",
    "register_callback",
    "register_dataset",
    "register_family",
    "register_loss_scale",
    "register_model",
    "register_objective",
    "register_optimizer",
    "register_template",
    "sft_main",
]


def __getattr__(name: str) -> object:
    if name not in _WHERE:
        where = f"; `from swiftlite.api import {name}`" if name in ("convert", "train", "Run") else ""
        raise AttributeError(
            f"module 'swiftlite' has no attribute {name!r}{where}; it has {', '.join(sorted(__all__))}"
        )
    value = getattr(import_module(_WHERE[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
