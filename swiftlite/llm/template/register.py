"""`get_template`, which makes a Template for a tokenizer; the templates themselves are in families/templates.py."""

from __future__ import annotations

from typing import Any

from swiftlite.families.templates import JINJA, get_template_meta
from swiftlite.llm.template.base import Template
from swiftlite.llm.template.thinking import ThinkingTemplate
from swiftlite.utils.errors import UsageError

TEMPLATE_CLASSES: dict[str, type[Template]] = {"Template": Template, "ThinkingTemplate": ThinkingTemplate}


def register_template_class(name: str, template_class: type[Template]) -> None:
    """Add a class that TemplateMeta.template_cls may name."""
    TEMPLATE_CLASSES[name] = template_class


def get_template(
    template_type: str,
    tokenizer: Any,
    *,
    default_system: str | None = None,
    max_length: int | None = None,
    truncation_strategy: str = "raise",
    agent_template: str | None = None,
    use_chat_template: bool = True,
    remove_unused_columns: bool = True,
    padding_free: bool = False,
    padding_side: str = "right",
    loss_scale: str = "default",
    sequence_parallel_size: int = 1,
    response_prefix: str | None = None,
    template_backend: str = "swift",
    max_pixels: int | None = None,
    norm_bbox: str | None = None,
    enable_thinking: bool | None = None,
    add_non_thinking_prefix: bool = True,
) -> Template:
    """Make the template of a type for a tokenizer.

    Args:
        default_system: system text for conversations without one; None keeps the template's own, "" writes none.
        max_length: most tokens of a training row. truncation_strategy: what happens to longer ones: 'raise' and
            'delete' raise MaxLengthError (data sets count and drop the row), 'left' and 'right' cut that side, 'split'
            makes several samples of them (data sets only).
        agent_template: how tools are written: the template's own way, or 'hermes' where its model has none.
        use_chat_template: False writes contents end to end and the end token, for pre-training.
        remove_unused_columns: False keeps a row's other keys in what `encode` returns.
        padding_free: the collator joins rows instead of padding them. padding_side: 'left' or 'right'.
        loss_scale: 'default' (all answers), 'last_round' or 'all' (every token), and '+NAME' for weights by pattern, see
            `swiftlite.llm.template.loss_scale`.
        sequence_parallel_size: batches are padded to a multiple of it.
        response_prefix: what the answer starts with at generation, instead of the template's own.
        template_backend: whose text is written: 'swift', that of this type; 'jinja', the tokenizer's own chat template;
            'auto': the tokenizer's if it has one.
        max_pixels, norm_bbox: for multimodal models; no effect.
        enable_thinking: for models that can think or not; None leaves the official default.
        add_non_thinking_prefix: False leaves out the empty thought block that a template writes before an answer
            without thoughts.
    Raises: UsageError for an unknown type (the nearest is named) or value.
    """
    if template_type == JINJA:
        template_backend = "jinja"
    meta = get_template_meta(template_type)
    template_class = TEMPLATE_CLASSES.get(meta.template_cls)
    if template_class is None:
        raise UsageError(
            f"template {meta.template_type!r} names class {meta.template_cls!r}; known: {', '.join(TEMPLATE_CLASSES)}; "
            "call register_template_class first"
        )
    return template_class(
        meta,
        tokenizer,
        default_system=default_system,
        max_length=max_length,
        truncation_strategy=truncation_strategy,
        agent_template=agent_template,
        use_chat_template=use_chat_template,
        remove_unused_columns=remove_unused_columns,
        padding_free=padding_free,
        padding_side=padding_side,
        loss_scale=loss_scale,
        sequence_parallel_size=sequence_parallel_size,
        response_prefix=response_prefix,
        template_backend=template_backend,
        max_pixels=max_pixels,
        norm_bbox=norm_bbox,
        enable_thinking=enable_thinking,
        add_non_thinking_prefix=add_non_thinking_prefix,
    )
