"""TemplateOptions: what may be said about a template besides its type and its tokenizer."""

from __future__ import annotations

from dataclasses import dataclass

from swiftlite.utils.errors import UsageError
from swiftlite.utils.logger import warn_once

ALLOWED = {
    "truncation_strategy": ("raise", "delete", "left", "right", "split"),
    "padding_side": ("left", "right"),
    "template_backend": ("auto", "swift", "jinja"),
}


@dataclass(eq=False)
class TemplateOptions:
    """Keyword arguments of `get_template`, and attributes of a Template. Raises: UsageError for an unknown value.

    default_system: system text for conversations without one; None keeps the template's own, "" writes none.
    max_length: most tokens of a training row. truncation_strategy: what happens to longer ones: 'raise' and 'delete'
        raise MaxLengthError (datasets count and drop the row), 'left' and 'right' cut that side, 'split' makes several
        samples of them (datasets only).
    agent_template: how tools are written: the template's own way, or 'hermes' where its model has none.
    use_chat_template: False writes contents end to end and the end token, for pre-training.
    remove_unused_columns: False keeps a row's other keys in what `encode` returns.
    padding_free: the collator joins rows instead of padding them. padding_side: 'left' or 'right'.
    loss_scale: 'default' (all answers), 'last_round' or 'all' (every token), and '+NAME' for weights by pattern, see
        `swiftlite.llm.template.loss_scale`.
    sequence_parallel_size: batches are padded to a multiple of it.
    pooled: a conversation is encoded to be read as a whole: no token has a label, and one that ends with a question ends
        with what opens the answer. A row's `label` stays with it.
    response_prefix: what the answer starts with at generation, instead of the template's own.
    template_backend: whose text is written: 'swift', that of this type; 'jinja', the tokenizer's own chat template;
        'auto': the tokenizer's if it has one.
    max_pixels, norm_bbox: for multimodal models; no effect.
    enable_thinking: for models that can think or not; None leaves the official default.
    add_non_thinking_prefix: False leaves out the empty thought block that a template writes before an answer without
        thoughts.
    """

    default_system: str | None = None
    max_length: int | None = None
    truncation_strategy: str = "raise"
    agent_template: str | None = None
    use_chat_template: bool = True
    remove_unused_columns: bool = True
    padding_free: bool = False
    padding_side: str = "right"
    loss_scale: str = "default"
    sequence_parallel_size: int = 1
    pooled: bool = False
    response_prefix: str | None = None
    template_backend: str = "swift"
    max_pixels: int | None = None
    norm_bbox: str | None = None
    enable_thinking: bool | None = None
    add_non_thinking_prefix: bool = True

    def __post_init__(self) -> None:
        for name, allowed in ALLOWED.items():
            value = getattr(self, name)
            if value not in allowed:
                raise UsageError(f"--{name} {value!r} is unknown; use one of {', '.join(allowed)}")
        if self.max_pixels is not None or self.norm_bbox is not None:
            warn_once("--max_pixels and --norm_bbox have no effect on text models")
