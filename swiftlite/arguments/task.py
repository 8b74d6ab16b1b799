"""What a model is trained for: text, or classes, numbers, scores, vectors; and the names of the losses."""

from __future__ import annotations

from swiftlite.arguments.parser import Arguments, Note, arguments, field
from swiftlite.utils.errors import UsageError

TASKS = ("causal_lm", "seq_cls", "embedding", "reranker", "generative_reranker")
PROBLEMS = ("single_label_classification", "multi_label_classification", "regression")

# Losses of each task by the names that ms-swift has for them, the default first.
TASK_LOSSES: dict[str, tuple[str, ...]] = {
    "causal_lm": ("cross_entropy", "loss_scale"),
    "seq_cls": ("cross_entropy",),
    "embedding": ("infonce", "cosine_similarity", "contrastive", "online_contrastive"),
    "reranker": ("pointwise_reranker", "listwise_reranker"),
    "generative_reranker": ("pointwise_reranker", "listwise_reranker"),
}
GROUPED = ("embedding", "reranker", "generative_reranker")
HEADED = ("seq_cls", "reranker")
JUDGING_WORDS = ("generative_reranker_positive_token", "generative_reranker_negative_token")
# Losses of pairs of answers, and those of them that need no reference.
REFERENCE_FREE = ("cpo", "simpo", "orpo")
MIXABLE = ("sigmoid", "hinge", "robust", "sppo_hard", "apo_zero", "apo_down", "bco_pair")  # of whole answers' scores
PAIR_LOSS_TYPES = (MIXABLE[0], "ipo", *MIXABLE[1:], *REFERENCE_FREE)
KTO_LOSS_TYPES = ("kto", "apo_zero_unpaired")
_OF_TASKS = dict.fromkeys(name for names in TASK_LOSSES.values() for name in names)
LOSS_TYPES = (*_OF_TASKS, *PAIR_LOSS_TYPES, *KTO_LOSS_TYPES)

_WITHOUT = Note("rejected", "belongs to `swiftlite sft` and to what is done with its model")


@arguments
class TaskArguments(Arguments):
    """Task: what the model is for"""

    task_type: str | None = field(
        None,
        "what the model gives: text (causal_lm), classes or numbers (seq_cls), a vector (embedding), or how well a document "
        "answers a query (reranker; generative_reranker by the words yes and no)",
        choices=TASKS, common=True,
        unavailable={
            "DpoArguments": Note("default only", "--rlhf_type says what pairs train", ("causal_lm",)),
            "InferArguments": Note(
                "default only", "inference writes text, classes or scores; for vectors, sentence-transformers: "
                "SentenceTransformer(DIR).encode(texts)", ("causal_lm", "seq_cls", "reranker", "generative_reranker"),
            ),
            "PtArguments": Note("default only", "pt trains on text; use `swiftlite sft`", ("causal_lm",)),
        },
    )  # fmt: skip
    num_labels: int | None = field(
        None, "classes of --task_type seq_cls, or numbers that it predicts (default: what the model's head has)", least=1,
        unavailable={
            **dict.fromkeys(("DpoArguments", "PtArguments"), _WITHOUT),
        },
    )  # fmt: skip
    problem_type: str | None = field(
        None, "kind of its labels (default: regression for one, else multi_label_classification where they are lists)",
        choices=PROBLEMS,
        unavailable={
            **dict.fromkeys(("DpoArguments", "PtArguments"), _WITHOUT),
        },
    )  # fmt: skip

    generative_reranker_positive_token: str = field(
        "yes", "word with which --task_type generative_reranker agrees",
        unavailable={**dict.fromkeys(("DpoArguments", "PtArguments"), _WITHOUT)},
    )  # fmt: skip
    generative_reranker_negative_token: str = field(
        "no", "word with which it does not", unavailable={**dict.fromkeys(("DpoArguments", "PtArguments"), _WITHOUT)}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in JUDGING_WORDS:
            if name in self.given and self.task_type != "generative_reranker":
                raise UsageError(f"--{name} {getattr(self, name)}: goes with --task_type generative_reranker; add that")
        if self.task_type == "seq_cls":
            self._check_labels()
            return
        if self.task_type == "reranker" and self.num_labels in (None, 1):
            self.num_labels = 1
            return
        for name in ("num_labels", "problem_type"):
            if name in self.given and getattr(self, name) is not None:
                raise UsageError(f"--{name} {getattr(self, name)}: goes with --task_type seq_cls; add that")

    def _check_labels(self) -> None:
        if self.num_labels == 1 and self.problem_type not in (None, "regression"):
            raise UsageError(
                f"--num_labels 1 with --problem_type {self.problem_type}: one number is a regression; classes are at least 2"
            )

    @property
    def has_head(self) -> bool:
        """Does a score head stand in place of the output layer?"""
        return self.task_type in HEADED

    @property
    def groups(self) -> bool:
        """Are rows a query or anchor with texts that belong to it?"""
        return self.task_type in GROUPED

    @property
    def reads_labels(self) -> bool:
        """Do rows have a column `label`?"""
        return self.task_type == "seq_cls"

    @property
    def pools(self) -> bool:
        """Is a conversation read as a whole and its last token taken, rather than answered?"""
        return self.task_type not in (None, "causal_lm")


@arguments
class TeacherArguments(Arguments):
    """Distillation: the teacher"""

    teacher_model: str | None = field(
        None, "directory or id of the teacher of --rlhf_type gkd, which has the same tokens as the model", path=True
    )
    temperature: float = field(1.0, "of --rlhf_type gkd: divides the logits of student and teacher", least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.temperature:
            raise UsageError(f"--temperature {self.temperature}: divides logits, so it must be above 0")
