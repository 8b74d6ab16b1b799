"""The model registry, and the way from what the user calls a model to its ModelInfo and ModelMeta.

Reads small JSON files only; no weights, no transformers.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from swiftlite.checkpoint import hub, info
from swiftlite.checkpoint.model_type import Facts, choose, likely
from swiftlite.families import MODEL_MAPPING, families
from swiftlite.families.hf_config import classes_of, is_backbone, language_model, text_config
from swiftlite.families.records import ModelMeta, Release, TemplateMeta
from swiftlite.families.rope import check_agreement
from swiftlite.families.templates import TEMPLATE_MAPPING
from swiftlite.utils.errors import ConfigError, SwiftliteError, UsageError
from swiftlite.utils.logger import get_logger
from swiftlite.utils.text import some
from swiftlite.utils.types import Config, Settings

if TYPE_CHECKING:
    import torch
    from packaging.requirements import Requirement

logger = get_logger()

# A requirement that excludes every transformers release swiftlite runs with speaks of code a checkpoint once brought
# along; today's transformers has the architecture itself.
OLDEST_TRANSFORMERS = "4.57"


# Parts of names of checkpoints whose weights are quantised in a way that is not read here.
_QUANTISED = re.compile(r"awq|gptq|aqlm|bnb|nf4|int[48]|[248]-?bits?|\dx\d+", re.IGNORECASE)


# Classes of transformers that build a language model, and the tables of the model types each of them knows.
AUTO_CLASSES = {
    "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "AutoModelForImageTextToText": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
}


def _match(model_id_or_path: str, registry: Mapping[str, ModelMeta]) -> tuple[ModelMeta, Release] | None:
    return _named(hub.model_name(model_id_or_path), registry)


def _named(name: str, registry: Mapping[str, ModelMeta]) -> tuple[ModelMeta, Release] | None:
    for meta in registry.values():
        for release in meta.releases:
            if any(i.rstrip("/").rsplit("/", 1)[-1].lower() == name for i in release.ids):
                return meta, release
    return None


def _refuse_quantised(model_id: str, use_hf: bool, registry: Mapping[str, ModelMeta]) -> None:
    """Raises: UsageError for a hub id that is a registered one but for the name of a quantisation, before it is fetched."""
    words = hub.model_name(model_id).split("-")
    kept = [word for word in words if not _QUANTISED.fullmatch(word)]
    found = _named("-".join(kept), registry) if len(kept) < len(words) else None
    if found:
        raise UsageError(
            f"--model {model_id} holds quantised weights, which cannot be trained or converted; use "
            f"{found[1].ids[use_hf]}"
        )


def get_matched_model_meta(model_id_or_path: str, registry: Mapping[str, ModelMeta] | None = None) -> ModelMeta | None:
    """The ModelMeta that a hub id or directory name belongs to, with its release's own settings laid over; else None.

    Names are compared by their last component, in lower case; cache paths of both hubs are understood.
    """
    found = _match(model_id_or_path, MODEL_MAPPING if registry is None else registry)
    if found is None:
        return None
    meta, release = found
    return dataclasses.replace(meta, ignore_patterns=release.ignore_patterns) if release.ignore_patterns else meta


def _hub_id(model_id: str, release: Release | None, use_hf: bool) -> str:
    """The id on the hub in use, where the user gave the one of the other hub."""
    if release is None:
        return model_id
    here, there = release.ids[use_hf], release.ids[not use_hf]
    if model_id == there and here != there:
        logger.info("%s is called %s on %s", model_id, here, "Hugging Face" if use_hf else "ModelScope")
        return here
    return model_id


def _unknown_type(model_type: str, registry: Mapping[str, ModelMeta]) -> UsageError:
    near = difflib.get_close_matches(model_type, registry, n=3)
    hint = f"did you mean {', '.join(near)}?" if near else f"some that are: {some(sorted(registry))} (docs/models.md)"
    return UsageError(f"--model_type {model_type} is not registered; {hint}")


def check_model_type(model_type: str, registry: Mapping[str, ModelMeta] | None = None) -> None:
    """Raises: UsageError for a type that is not registered, naming the nearest."""
    registry = MODEL_MAPPING if registry is None else registry
    if model_type not in registry:
        raise _unknown_type(model_type, registry)


def _architecture(config: Config, model_dir: str) -> str:
    architectures = config.get("architectures") or []
    if architectures:
        return str(architectures[0])
    hf_type = str(config.get("model_type"))
    try:
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        known = dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    except ImportError:
        known = {}
    if hf_type in known:
        return str(known[hf_type])
    raise ConfigError(
        f"{model_dir}/config.json names no architecture and its model_type {hf_type!r} is not known to transformers; "
        "give --model_type"
    )


def _candidates(architecture: str, config: Config, registry: Mapping[str, ModelMeta]) -> list[ModelMeta]:
    # transformers may save a model under the class it shares with another one, keeping only `model_type` as its own
    # (InternLM3 as LlamaForCausalLM). Such a type is recognised by its class being named after it.
    hf_type = str(config.get("model_type"))
    own = registry.get(hf_type)
    named_after = own and own.architectures and own.architectures[0].lower().startswith(hf_type.replace("_", ""))
    if own and named_after and own.architectures[0] != architecture:
        return [own]
    found = [meta for meta in registry.values() if architecture in meta.architectures]
    if found:
        return found
    # Other spellings of a class are known to its family only.
    same = {name for family in families() if architecture in family.architectures for name in family.architectures}
    return [meta for meta in registry.values() if same.intersection(meta.architectures)]


def _check_buildable(architecture: str, facts: Facts) -> None:
    """Raises: ConfigError for a config that transformers builds no language model of."""
    named = facts.config.get("auto_map")
    if isinstance(named, Mapping) and named.keys() & set(AUTO_CLASSES):
        return  # the checkpoint's own code, which --trust_remote_code lets run
    from transformers.models.auto import modeling_auto

    hf_type = facts.config.get("model_type")
    if not any(hf_type in getattr(modeling_auto, table) for table in AUTO_CLASSES.values()):
        raise ConfigError(
            f"{facts.model_dir}/config.json has architecture {architecture} (model_type {hf_type!r}), which is not "
            "supported: the installed transformers knows no language model of this type; give --model_type if it is a "
            "registered one under another name (docs/models.md)"
        )


def _resolve_type(
    facts: Facts, need_template: bool, registry: Mapping[str, ModelMeta], templates: Mapping[str, TemplateMeta]
) -> tuple[str | None, ModelMeta, str]:
    """`(model_type, meta, explanation)` from the recorded arguments, the name, or the architecture with its clues."""
    architecture = _architecture(facts.config, facts.model_dir)
    recorded = str(info.load_args(facts.model_dir).get("model_type"))
    if recorded in registry:
        return recorded, registry[recorded], "args.json next to the weights says so"
    for name in (facts.given_name, facts.model_dir):
        found = _match(name, registry) if name else None
        if found and language_model(architecture) in found[0].architectures:
            meta = registry[found[0].model_type]
            return meta.model_type, meta, f"the name {hub.model_name(name)} is registered"
        if found:
            logger.info(
                "the name %s belongs to %s, but the config says %s; looking at the files instead",
                hub.model_name(name),
                found[0].model_type,
                architecture,
            )
    candidates = likely(facts, _candidates(language_model(architecture), facts.config, registry))
    if not candidates:
        _check_buildable(architecture, facts)
        plain = ModelMeta(str(facts.config.get("model_type") or architecture), architectures=(architecture,))
        return None, plain, f"{architecture} has no Megatron mapping, transformers only"
    if len(candidates) == 1:
        return candidates[0].model_type, candidates[0], f"it is the only type with architecture {architecture}"
    choice = choose(facts, candidates, templates)
    explanation = "; ".join([f"{len(candidates)} types have architecture {architecture}", *choice.reasons])
    first = choice.candidates[0]
    if len(choice.candidates) == 1:
        return first.model_type, first, explanation
    if len(choice.templates) == 1:
        others = some((meta.model_type for meta in choice.candidates[1:]), 3)
        return first.model_type, first, f"{explanation}; {others} would mean the same: template {first.template}"
    names = some(meta.model_type for meta in choice.candidates)
    if need_template and not facts.jinja:
        raise UsageError(
            f"{facts.model_dir} ({architecture}) holds no chat template and may be any of {names}, which have different "
            "ones, and neither its name nor its config tells which; give --model_type or --template"
        )
    undecided = dataclasses.replace(first, template=None)
    why = "the text is that of its own chat template" if facts.jinja else "no chat template is used"
    return None, undecided, f"{explanation}; undecided between {names}, which does not matter: {why}"


@functools.cache
def _tell(text: str) -> None:
    """Once: a command looks at its model several times."""
    logger.info(text)


def _check_requirements(model_type: str, requires: tuple[str, ...], ignore: bool) -> None:
    from importlib.metadata import PackageNotFoundError, version

    from packaging.requirements import Requirement

    for text in requires:
        requirement = Requirement(text)
        if requirement.name == "transformers" and _excludes_supported(requirement):
            logger.debug("%s: requirement %s is about older code and is not applied", model_type, text)
            continue
        try:
            installed: str | None = version(requirement.name)
        except PackageNotFoundError:
            installed = None
        if installed and requirement.specifier.contains(installed, prereleases=True):
            continue
        message = f"model type {model_type} needs {text}, but {installed or 'no such package'} is installed"
        if not ignore:
            raise SwiftliteError(f"{message}; run: pip install '{text}' (or continue with --ignore_requirements true)")
        logger.warning("%s; continuing as --ignore_requirements says", message)


def _templates() -> dict[str, TemplateMeta]:
    """Every known template: built in, registered, or part of a family."""
    return {**{t.template_type: t for f in families() for t in f.templates}, **TEMPLATE_MAPPING}


def _excludes_supported(requirement: Requirement) -> bool:
    from packaging.version import Version

    uppers = [Version(s.version) for s in requirement.specifier if s.operator in ("<", "<=")]
    return any(upper <= Version(OLDEST_TRANSFORMERS) for upper in uppers)


def _fetch(
    name: str, registry: Mapping[str, ModelMeta], use_hf: bool, revision: str | None, weights: bool, token: str | None
) -> str:
    """The directory of a model, fetched if it is a hub id; of a registered one without the files that are not needed."""
    found = _match(name, registry)
    meta, release = found or (None, None)
    if found is None and hub.local_directory(name) is None:
        _refuse_quantised(name, use_hf, registry)
    ignored = (*(meta.ignore_patterns if meta else ()), *(release.ignore_patterns if release else ()))
    return hub.fetch(
        _hub_id(name, release, use_hf), use_hf=use_hf, revision=revision, download_model=weights, ignore_patterns=ignored,
        token=token,
    )  # fmt: skip


def get_model_info_meta(
    model_id_or_path: str,
    *,
    torch_dtype: str | torch.dtype | None = None,
    use_hf: bool = False,
    model_type: str | None = None,
    revision: str | None = None,
    download_model: bool = False,
    need_template: bool = True,
    ignore_requirements: bool = False,
    task_type: str | None = None,
    num_labels: int | None = None,
    hub_token: str | None = None,
    registry: Mapping[str, ModelMeta] | None = None,
    templates: Mapping[str, TemplateMeta] | None = None,
) -> tuple[info.ModelInfo, ModelMeta]:
    """Find out what a model is, without touching its weights.

    Args:
        model_id_or_path: local directory, ModelScope id, or Hugging Face id with `use_hf`.
        torch_dtype: dtype to use; else the type's, else the config's, else bf16/fp16 on a GPU and fp32 on a CPU.
        model_type: skips recognition. Else: args.json next to the weights, the registered name, the architecture.
        download_model: whether a hub id's weights are fetched too.
        need_template: False where no chat template is used (conversion): types that differ only in it need not be told
            apart; then `ModelInfo.model_type` and `ModelMeta.template` are None.
        ignore_requirements: log unmet requirements of the type instead of raising.
        registry, templates: other tables than the global ones, for tests.
    Returns: ModelInfo (its `explanation` says how the type was found; `config` is config.json) and ModelMeta.
    Raises: UsageError for a missing directory, an unknown or undecidable type; CheckpointError for broken files or an
        unreachable hub; ConfigError for an unsupported architecture, or two values of one rope setting;
        SwiftliteError for an unmet requirement.
    """
    registry = MODEL_MAPPING if registry is None else registry
    templates = _templates() if templates is None else templates
    if model_type is not None:
        check_model_type(model_type, registry)
    model_dir = _fetch(model_id_or_path, registry, use_hf, revision, download_model, hub_token)
    config = info.read_config(model_dir)
    check_agreement(text_config(config))
    info.check_against_weights(config, model_dir)
    resolved: str | None = model_type
    if model_type is not None:
        meta, explanation = registry[model_type], "--model_type says so"
    else:
        facts = Facts(model_dir, config, given_name=str(model_id_or_path))
        resolved, meta, explanation = _resolve_type(facts, need_template, registry, templates)
        _tell(f"{model_dir}{f' is of type {resolved}' if resolved else ''}: {explanation}")
    _check_requirements(meta.model_type, meta.requires, ignore_requirements)
    natural = "embedding" if is_backbone(config) else "seq_cls" if num_labels or classes_of(config) else "causal_lm"
    known: Settings = {
        "model_type": resolved, "model_dir": model_dir, "explanation": explanation,
        "num_labels": num_labels or classes_of(config),
        "torch_dtype": info.to_torch_dtype(torch_dtype) or info.to_torch_dtype(meta.torch_dtype),
        "task_type": task_type or meta.task_type or natural,
    }  # fmt: skip
    return info.describe(config, **known), meta
