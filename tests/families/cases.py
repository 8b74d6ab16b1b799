"""Tiny Hugging Face models of every registered type, with random norms and biases, written by transformers itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from swiftlite.checkpoint import registry
from swiftlite.families import MODEL_MAPPING, family_of, tiny_configs
from swiftlite.families.hf_config import architecture_of
from swiftlite.llm.model.corrections import correct
from swiftlite.utils.errors import SwiftliteError

CONFIGS: dict[str, dict[str, dict[str, Any]]] = tiny_configs()


def _built_here(model_type: str, variant: str) -> bool:
    """Whether the installed transformers has the type's class; commands refuse the others, naming the release they need.

    Rope settings by kind of layer are read since 5.0.
    """
    rope = CONFIGS[model_type][variant].get("rope_parameters") or {}
    text = str((CONFIGS[model_type][variant].get("text_config") or {}).get("model_type"))
    of_part = MODEL_MAPPING[text].requires if text in MODEL_MAPPING else ()
    by_kind = ("transformers>=5.0",) if any(isinstance(value, dict) for value in rope.values()) else ()
    try:
        registry._check_requirements(
            model_type, (*MODEL_MAPPING[model_type].requires, *of_part, *by_kind), ignore=False
        )
    except SwiftliteError:
        return False
    return True


CASES = [f"{t}:{variant}" for t, variants in CONFIGS.items() for variant in variants if _built_here(t, variant)]


def config_of(case: str) -> dict[str, Any]:
    model_type, variant = case.split(":")
    return dict(CONFIGS[model_type][variant])


def distinct_cases() -> list[str]:
    """One case of each distinct config."""
    seen: dict[str, str] = {}
    for case in CASES:
        seen.setdefault(json.dumps(config_of(case), sort_keys=True), case)
    return list(seen.values())


def build_hf(config: dict[str, Any], directory: Path, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """Make a model of this config with transformers, save it and return it (eval mode).

    config.json is rewritten as hubs have it. 1-D parameters and expert biases are randomised: they start at 1 or 0,
    where mistakes in their mapping hide. MTP tensors, which transformers leaves out, are added to the files.
    """
    from safetensors.torch import load_file, save_file
    from transformers import CONFIG_MAPPING, AutoConfig, __version__

    from swiftlite.checkpoint.bind import bind_map
    from swiftlite.llm.model import reference
    from swiftlite.llm.model.loader import auto_class

    reference.register()
    directory.mkdir(parents=True, exist_ok=True)
    aliases = family_of(architecture_of(config)).aliases
    known = {**config, "model_type": aliases.get(config["model_type"], config["model_type"])}
    if known["model_type"] not in CONFIG_MAPPING:
        assert __version__.startswith("4."), f"{known['model_type']} is in no model that this release knows"
        pytest.skip(f"transformers {__version__} has no model of type {known['model_type']}")
    (directory / "config.json").write_text(json.dumps(known))
    torch.manual_seed(seed)
    model = auto_class(config).from_config(AutoConfig.from_pretrained(directory), dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 or name.endswith("_bias"):
                parameter += 0.1 * torch.randn_like(parameter)
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith(("e_score_correction_bias", "expert_bias")):
                tensor += 0.05 * torch.randn_like(tensor)
    model.eval().save_pretrained(directory)
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    path = directory / "model.safetensors"
    tensors = load_file(path)
    # transformers 5.24 writes Kimi-K2.5's text layers so; the published files do not.
    hub = {
        name.replace("language_model.model.blocks.", "language_model.model.layers."): t for name, t in tensors.items()
    }
    if hub.keys() != tensors.keys():
        tensors = hub
        save_file(tensors, path, {"format": "pt"})
    missing = mtp_tensors(config, tensors, dtype)
    if missing:
        save_file({**tensors, **missing}, path, {"format": "pt"})
    bound = bind_map(config, {**tensors, **missing})
    assert set(bound.by_hf) <= {part for name in (*tensors, *missing) for part in bound.parts(name)}
    return correct(model)


def mtp_tensors(
    config: dict[str, Any], tensors: dict[str, torch.Tensor], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Random MTP blocks as official checkpoints store them, with their copies of embedding and head."""
    from swiftlite.checkpoint.bind import bind_map, naming_of, resolve_copy, text_config

    if not family_of(architecture_of(config)).num_mtp(text_config(config)):
        return {}
    bound = bind_map(config, with_mtp=True, naming=naming_of(config, tensors))
    found = {}
    for name, (entry, position) in bound.by_hf.items():
        if name not in tensors:
            found[name] = (0.1 * torch.randn(entry.hf_shapes[position])).to(dtype)
    for duplicate in bound.duplicates:
        if duplicate.name != "lm_head.weight":
            found[duplicate.name] = tensors[resolve_copy(duplicate, bound)].clone()
    return found
