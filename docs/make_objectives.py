"""Writes the table at the head of docs/objectives.md: `python docs/make_objectives.py`. Sides, losses and flags are asked of
the commands' own arguments."""

from __future__ import annotations

import logging
import typing
from pathlib import Path

from swiftlite.arguments.megatron_preference import MegatronDpoArguments
from swiftlite.arguments.megatron_train import MegatronPtArguments, MegatronSftArguments
from swiftlite.arguments.parser import Spec, notes, parse, specs
from swiftlite.arguments.preference import DpoArguments
from swiftlite.arguments.task import LOSS_TYPES
from swiftlite.arguments.train import PtArguments, SftArguments
from swiftlite.utils.errors import UsageError

FILE = Path(__file__).with_name("objectives.md")
BEGIN, END = "<!-- make_objectives.py -->\n", "<!-- end -->\n"
COMMANDS: dict[str, tuple[type[SftArguments], type[MegatronSftArguments]]] = {
    "sft": (SftArguments, MegatronSftArguments),
    "pt": (PtArguments, MegatronPtArguments),
    "rlhf": (DpoArguments, MegatronDpoArguments),
}
# What is trained: the command, the columns of its rows.
OBJECTIVES = {
    "continued pretraining": ("pt", "`text`"),
    "supervised fine-tuning": ("sft", "`messages`"),
    "preference": ("rlhf --rlhf_type dpo", "`messages` and `rejected_response` or `rejected_messages`"),
    "preference without a reference": ("rlhf --rlhf_type cpo", "the same"),
    "of mean log-probabilities": ("rlhf --rlhf_type simpo", "the same"),
    "of odds": ("rlhf --rlhf_type orpo", "the same"),
    "labelled answers": ("rlhf --rlhf_type kto", "`messages` and `label` (true or false), or pairs"),
    "distillation": ("rlhf --rlhf_type gkd --teacher_model DIR", "`messages`"),
    "reward model": ("rlhf --rlhf_type rm", "as preference, perhaps `margin`"),
    "classes, numbers": ("sft --task_type seq_cls --num_labels N", "`messages` or `text`, and `label`"),
    "embedding model": ("sft --task_type embedding", "an anchor, a text near it, perhaps others; or pairs and `label`"),
    "reranker": ("sft --task_type reranker", "a query, a document that answers it, others that do not"),
    "generative reranker": ("sft --task_type generative_reranker", "the same"),
}  # fmt: skip
_SAID = ("loss_type", "packing_strategy", "task_type", "num_labels", "teacher_model")  # elsewhere in the row
_RARE = 5  # objectives at most that share a flag of their own


def _accepts(cls: type[SftArguments], command: str, *more: str) -> bool:
    words = command.replace(" N", " 3").split()[1:]
    try:
        parse(cls, ["--model", "DIR", *words, *more])
    except UsageError:
        return False
    return True


def _value(spec: Spec) -> str:
    if spec.choices:
        return str(spec.choices[-1])
    kinds = {bool: "true", int: "2", float: "0.5"}
    return next((kinds[kind] for kind in (spec.type, *typing.get_args(spec.type)) if kind in kinds), "DIR")


def table() -> str:
    """The rows: what, command, sides, columns of the data, losses (the default first), flags that few others have."""
    taken = {}
    for command, _ in OBJECTIVES.values():
        cls = COMMANDS[command.split()[0]][0]
        flags = {n: s for n, s in specs(cls).items() if n not in notes(cls) and n not in _SAID}
        taken[command] = [n for n, spec in flags.items() if _accepts(cls, command, f"--{n}", _value(spec))]
    lines = ["| | command | on Megatron | rows | `--loss_type` | flags of its own |\n", "|---|---|---|---|---|---|\n"]
    for name, (command, rows) in OBJECTIVES.items():
        cls, megatron = COMMANDS[command.split()[0]]
        losses = [loss for loss in LOSS_TYPES if _accepts(cls, command, "--loss_type", loss)]
        own = [n for n in taken[command] if sum(n in flags for flags in taken.values()) <= _RARE]
        both = "yes" if _accepts(megatron, command) else "no"
        cells = [name, f"`{command}`", both, rows, *(", ".join(f"`{n}`" for n in part) for part in (losses, own))]
        lines.append(f"| {' | '.join(cells)} |\n")
    return "".join(lines)


def written(text: str) -> str:
    """The page with the table as it is now."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}{table()}{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    logging.disable()
    FILE.write_text(written(FILE.read_text(encoding="utf-8")), encoding="utf-8")
