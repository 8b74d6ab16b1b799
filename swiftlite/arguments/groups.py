"""Arguments of embedding models and rerankers, which learn from texts that belong together."""

from __future__ import annotations

from swiftlite.arguments.base import BaseArguments
from swiftlite.arguments.parser import Note, arguments, field, specs
from swiftlite.utils.errors import UsageError

# Beginnings of flags -> where they act.
_ACTS = {
    "infonce": "--loss_type infonce", "listwise": "--loss_type listwise_reranker",
    "max": "--task_type embedding, reranker or generative_reranker",
}  # fmt: skip
_OF_SFT = dict.fromkeys(
    ("DpoArguments", "PtArguments"), Note("rejected", "belongs to `sft --task_type embedding` and rerankers")
)
_OTHERWISE = {
    "packing": "join texts with --padding_free true", "streaming": "leave it out", "cached_dataset": "give --dataset",
}  # fmt: skip


@arguments
class GroupArguments(BaseArguments):
    """Groups: texts that belong together, for embedding models and rerankers"""

    infonce_temperature: float = field(0.1, "what cosines are divided by in --loss_type infonce", unavailable=_OF_SFT)
    infonce_use_batch: bool = field(
        True,
        "the other documents of a micro batch, of all data-parallel ranks, are negatives too; false: the row's own alone",
        unavailable=_OF_SFT,
    )
    infonce_mask_fake_negative: bool = field(
        False,
        "leave out negatives that are nearer than the positive by more than --infonce_fake_neg_margin",
        unavailable=_OF_SFT,
    )
    infonce_fake_neg_margin: float = field(0.1, "that difference of cosines", least=0, unavailable=_OF_SFT)
    infonce_include_qq: bool = field(False, "the other anchors of a micro batch are negatives too", unavailable=_OF_SFT)
    infonce_include_dd: bool = field(
        False, "so are cosines of the positive with other rows' documents", unavailable=_OF_SFT
    )
    max_positive_samples: int = field(
        1,
        "groups that a row with several positives makes, one for each; of more, a choice by --data_seed",
        least=1,
        unavailable=_OF_SFT,
    )
    max_negative_samples: int | None = field(
        None, "negatives of a row that are taken; of more, a choice by --data_seed (default: all, rerankers 7)",
        aliases=["infonce_hard_negatives"], least=0, unavailable=_OF_SFT,
    )  # fmt: skip
    listwise_reranker_temperature: float = field(
        1.0, "what scores are divided by in --loss_type listwise_reranker", unavailable=_OF_SFT
    )

    def settle_groups(self, loss: str | None) -> None:
        """Settle what the task says, for the loss that is minimised. Raises: UsageError for what does not fit the two."""
        self._check_flags(loss)
        if not self.groups:
            return
        for name, instead in _OTHERWISE.items():
            if getattr(self, name):
                raise UsageError(f"--{name}: is not for --task_type {self.task_type}; {instead}")
        if self.task_type == "embedding":  # as sentence-transformers asks for them
            if "use_chat_template" in self.given and self.use_chat_template:
                raise UsageError("--use_chat_template true: embeddings are of plain text; leave it out")
            self.use_chat_template = False
        elif self.max_negative_samples is None:
            self.max_negative_samples = 7
        if self.task_type != "generative_reranker":
            return
        if self.enable_thinking is None:  # it judges at once
            self.enable_thinking = False
        if self.truncation_strategy in ("left", "right"):
            raise UsageError(
                f"--truncation_strategy {self.truncation_strategy}: would cut the question itself; use delete"
            )

    def _check_flags(self, loss: str | None) -> None:
        acts = {"infonce": loss == "infonce", "listwise": loss == "listwise_reranker", "max": self.groups}
        for name in GROUP_FLAGS:
            kind = name.partition("_")[0]
            if name in self.given and not acts[kind]:
                raise UsageError(f"--{name} {getattr(self, name)}: goes with {_ACTS[kind]}; add that, or leave it out")
        for name in ("infonce_temperature", "listwise_reranker_temperature"):
            if getattr(self, name) <= 0:
                raise UsageError(f"--{name} {getattr(self, name)}: must be above 0")
        if (self.infonce_include_qq or self.infonce_include_dd) and not self.infonce_use_batch:
            raise UsageError("--infonce_use_batch false: looks at a row alone; leave out --infonce_include_qq and _dd")


GROUP_FLAGS = tuple(name for name in GroupArguments.__annotations__ if name in specs(GroupArguments))
