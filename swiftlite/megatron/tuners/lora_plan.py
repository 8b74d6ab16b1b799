"""Which layers of a model get adapters, and what these begin with: new ones, or those of `--adapters`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
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
from swiftlite.weights.rule import BoundMap
from swiftlite.weights.storage import Files, read_tensor

# Neither routers nor gates of shared experts; linear attention keeps its projections as parts of one matrix.
LINEAR = re.compile(r"\.(linear_\w+|in_proj|out_proj)\.weight(\.\w+)?$")


@dataclass(frozen=True)
class LoraPlan:
    """The adapters of a whole model.

    modules: Hugging Face module -> (rank, factor on B A). peft_config: what adapter_config.json says. values(module):
    A [r, in] and B [out, r] to begin with. rows: of tokens, to begin with.
    """

    modules: Mapping[str, tuple[int, float]]
    peft_config: Config
    values: Callable[[str], tuple[Tensor, Tensor]]
    rows: Rows = field(default_factory=dict)

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


def plan_lora(bound: BoundMap, args: MegatronSftArguments) -> LoraPlan:
    """New adapters on what `--target_modules` or `--target_regex` say; names are matched as peft does.

    Raises: UsageError for a name that no linear layer has.
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
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": args.model or args.mcore_model,
        "r": rank, "lora_alpha": args.lora_alpha, "lora_dropout": args.lora_dropout, "use_rslora": args.use_rslora,
        "target_modules": targets if isinstance(targets, str) else sorted(targets), "bias": "none",
        "inference_mode": True,
    }  # fmt: skip
    if bound.naming is not None:  # other parts have layers of the same names
        config["exclude_modules"] = rf"(?!{re.escape(bound.live.stored)}).*"

    def values(module: str) -> tuple[Tensor, Tensor]:
        entry, position = bound.by_hf[f"{module}.weight"]
        out, into = entry.hf_shapes[position]
        return initial_a(bound.module_name(module), rank, into, args.seed), torch.zeros(out, rank)

    return LoraPlan({name: (rank, scale) for name in chosen}, config, values)


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
        yield LoraPlan(modules, adapter.config, values, rows)


def with_new_rows(plan: LoraPlan, origin: Checkpoint) -> LoraPlan:
    """The plan, with the rows of the tokens that the run adds to the vocabulary, as peft is told to train them."""
    ids = origin.new_tokens.added if origin.new_tokens is not None else ()
    if not ids:
        return plan
    named = (origin.bound.own_name(weight) for weight in (EMBEDDING, HEAD))
    weights = [weight for weight in named if weight in origin.bound.by_hf]
    with Files() as files:
        rows = {
            weight: (ids, torch.cat([read_tensor(origin.source, weight, files, rows=(i, i + 1)) for i in ids]))
            for weight in weights
        }
    stated = {weight.split(".")[-2]: list(ids) for weight in weights}
    return replace(plan, rows=rows, peft_config={**plan.peft_config, "trainable_token_indices": stated})
