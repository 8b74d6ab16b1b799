"""Which layers of a model get adapters, and what these begin with: new ones, or those of `--adapters`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from swiftlite.arguments.megatron_train import MegatronSftArguments
from swiftlite.checkpoint.adapter import Adapter
from swiftlite.checkpoint.checkpoint import Checkpoint
from swiftlite.checkpoint.resolve import the_adapter
from swiftlite.llm.model.tuner import lora_targets
from swiftlite.megatron.tuners.rows import Rows
from swiftlite.utils.errors import MapError, UsageError
from swiftlite.utils.types import Config
from swiftlite.weights.lora import A, B, LoraConfig, initial_a
from swiftlite.weights.merged import EMBEDDING, HEAD
from swiftlite.weights.ops import COPY
from swiftlite.weights.rule import BoundMap
from swiftlite.weights.storage import Files, Renamed, WeightSource, read_tensor

# Neither routers nor gates of shared experts; linear attention keeps its projections as parts of one matrix.
LINEAR = re.compile(r"\.(linear_\w+|in_proj|out_proj)\.weight(\.\w+)?$")


# What peft calls the task of a model by its number of labels; others classify.
_PEFT_TASKS = {None: "CAUSAL_LM", 0: "FEATURE_EXTRACTION"}


@dataclass(frozen=True)
class LoraPlan:
    """The adapters of a whole model.

    modules: Hugging Face module -> (rank, factor on B A). peft_config: what adapter_config.json says. values(module):
    A [r, in] and B [out, r] to begin with. rows: of tokens, to begin with. whole: weights that are trained themselves.
    given: what has these to begin with, under their names; None: the model.
    """

    modules: Mapping[str, tuple[int, float]]
    peft_config: Config
    values: Callable[[str], tuple[Tensor, Tensor]]
    rows: Rows = field(default_factory=dict)
    whole: frozenset[str] = frozenset()
    given: WeightSource | None = None

    @property
    def ranks(self) -> dict[str, int]:
        return {module: rank for module, (rank, _) in self.modules.items()}

    def met_weights(self, bound: BoundMap, expert_share: float) -> float:
        """Numbers in A and B that a token meets."""
        total = 0.0
        for module, (rank, _) in self.modules.items():
            entry, position = bound.by_hf[f"{module}.weight"]
            total += rank * sum(entry.hf_shapes[position]) * (1.0 if entry.expert is None else expert_share)
        return total


def _linear_modules(bound: BoundMap) -> list[str]:
    """Hugging Face names of the modules that can have adapters."""
    held = (e for e in bound.entries if e.stack == "decoder.layers" and not e.rule.carried)
    entries = (e for e in held if LINEAR.search(f".{e.name}"))
    return list(dict.fromkeys(name.removesuffix(".weight") for entry in entries for name in entry.hf))


def saved_weights(bound: BoundMap, names: Sequence[str]) -> frozenset[str]:
    """Hugging Face weights of the modules whose names end as `--modules_to_save` says, which is how peft finds them.

    Raises: UsageError for a name that fits nothing, or a weight that Megatron keeps together with others.
    """
    modules: dict[str, list[str]] = {}
    for weight, ((entry, _), *_) in bound.uses.items():
        if entry.stack in (None, "decoder.layers") and not entry.rule.carried:
            parts = bound.module_name(weight).split(".")
            modules[weight] = [".".join(parts[:count]) for count in range(1, len(parts))]
    if bound.model.tied:  # one weight, which peft trains as one
        modules[bound.own_name(EMBEDDING)].append("lm_head")
    found = dict[str, str]()
    for name in names:
        fits = [weight for weight, outer in modules.items() if any(module.endswith(name) for module in outer)]
        if not fits:
            known = {outer[-1].rpartition(".")[2] for weight, outer in modules.items() if _is_apart(bound, weight)}
            raise UsageError(f"--modules_to_save {name}: no such module; there are {', '.join(sorted(known))}")
        found.update(dict.fromkeys(fits, name))
    together = next((weight for weight in found if not _is_apart(bound, weight)), None)
    if together:
        raise UsageError(
            f"--modules_to_save {found[together]}: {together} is a part of {bound.uses[together][0][0].name} on Megatron, "
            "which is not trained beside adapters; name it in --target_modules, or use --train_type full"
        )
    return frozenset(found)


def _is_apart(bound: BoundMap, weight: str) -> bool:
    """Is it a parameter of its own, as it is?"""
    ((entry, _), *others) = bound.uses[weight]
    return entry.rule.op == COPY and entry.expert is None and not others


def plan_lora(bound: BoundMap, args: MegatronSftArguments) -> LoraPlan:
    """New adapters on what `--target_modules` or `--target_regex` say; names are matched as peft does.

    Raises: UsageError for a name that no linear layer has; as saved_weights.
    """
    linear = _linear_modules(bound)
    targets = lora_targets({name.rpartition(".")[2] for name in linear}, args)
    if isinstance(targets, str):
        chosen = [name for name in linear if re.fullmatch(targets, name)]
        if not chosen:
            raise UsageError(f"--target_regex {targets}: fits no linear layer; the first is {linear[0]}")
    else:
        chosen = [name for name in linear if any(name == t or name.endswith(f".{t}") for t in targets)]
    rank = args.lora_rank
    scale = LoraConfig(rank, args.lora_alpha, args.use_rslora).scale("", rank)
    config = {
        "peft_type": "LORA", "task_type": _PEFT_TASKS.get(bound.model.num_labels, "SEQ_CLS"),
        "base_model_name_or_path": args.model or args.mcore_model,
        "r": rank, "lora_alpha": args.lora_alpha, "lora_dropout": args.lora_dropout, "use_rslora": args.use_rslora,
        "target_modules": targets if isinstance(targets, str) else sorted(targets), "bias": "none",
        "inference_mode": True,
    }  # fmt: skip
    to_save = list(
        dict.fromkeys((*args.modules_to_save, *(["score"] if bound.model.num_labels else [])))
    )  # as peft does
    whole = saved_weights(bound, to_save)
    twice = next((name for name in chosen if f"{name}.weight" in whole), None)
    if twice:
        raise UsageError(f"--modules_to_save: {twice} has LoRA too; leave it out there or in --target_modules")
    if whole:
        embedding = bound.own_name(EMBEDDING)
        tied = bound.model.tied and embedding in whole
        names = [name for name in to_save if not tied or name.rpartition(".")[2] != "lm_head"]
        # As peft writes it.
        own = [bound.module_name(embedding).removesuffix(".weight")] if tied else []
        config["modules_to_save"] = list(dict.fromkeys((*names, *own)))
        config["ensure_weight_tying"] = tied
    if bound.naming is not None:  # other parts have layers of the same names
        config["exclude_modules"] = rf"(?!{re.escape(bound.live.stored)}).*"

    def values(module: str) -> tuple[Tensor, Tensor]:
        entry, position = bound.by_hf[f"{module}.weight"]
        out, into = entry.hf_shapes[position]
        named = (
            module if bound.model.num_labels == 0 else bound.module_name(module)
        )  # as transformers names it otherwise
        return initial_a(named, rank, into, args.seed), torch.zeros(out, rank)

    return LoraPlan({name: (rank, scale) for name in chosen}, config, values, whole=whole)


@contextmanager
def read_lora(bound: BoundMap, args: MegatronSftArguments) -> Iterator[LoraPlan]:
    """The adapter that `--adapters DIR` or `--mcore_adapter DIR` names, of either format, open inside the block.

    Raises: as Adapter.open; UsageError for several adapters; MapError for one on layers that are not trained.
    """
    with Files() as files:
        adapter = Adapter.open(the_adapter(args), bound)

        def values(module: str) -> tuple[Tensor, Tensor]:
            a, b = (read_tensor(adapter.source, module + suffix, files) for suffix in (A, B))
            return a, b

        stray = sorted(set(adapter.ranks) - set(_linear_modules(bound)))
        if stray:
            raise MapError(f"{stray[0]}: adapters on such layers are not trained on Megatron")
        rows = {w: (ids, read_tensor(adapter.source, s, files)) for w, (s, ids) in adapter.extras.rows.items()}
        modules = {m: (r, adapter.lora.scale(m, r)) for m, r in adapter.ranks.items()}
        whole = adapter.extras.whole
        apart = next((weight for weight in whole if not _is_apart(bound, weight)), None)
        if apart:
            raise MapError(f"{apart}: is trained as a whole by the adapter, and on Megatron a part of another matrix")
        yield LoraPlan(modules, adapter.config, values, rows, frozenset(whole), Renamed(adapter.source, whole))


def with_new_rows(plan: LoraPlan, origin: Checkpoint) -> LoraPlan:
    """The plan, with the rows of the tokens that the run adds to the vocabulary, as peft is told to train them."""
    ids = origin.new_tokens.added if origin.new_tokens is not None else ()
    if not ids:
        return plan
    named = (origin.bound.own_name(weight) for weight in (EMBEDDING, HEAD))
    weights = [weight for weight in named if weight in origin.bound.by_hf and weight not in plan.whole]
    if not weights:
        return plan
    with Files() as files:
        rows = {
            weight: (ids, torch.cat([read_tensor(origin.source, weight, files, rows=(i, i + 1)) for i in ids]))
            for weight in weights
        }
    stated = {weight.split(".")[-2]: list(ids) for weight in weights}
    return replace(plan, rows=rows, peft_config={**plan.peft_config, "trainable_token_indices": stated})
