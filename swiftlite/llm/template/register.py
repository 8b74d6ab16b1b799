"""`get_template`, which makes a Template for a tokenizer; the templates themselves are in families/templates.py."""

from __future__ import annotations

from typing import TYPE_CHECKING

from swiftlite.families.templates import JINJA, get_template_meta
from swiftlite.llm.template.base import Template
from swiftlite.llm.template.thinking import ThinkingTemplate
from swiftlite.utils.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATE_CLASSES: dict[str, type[Template]] = {"Template": Template, "ThinkingTemplate": ThinkingTemplate}


def register_template_class(name: str, template_class: type[Template]) -> None:
    """Add a class that TemplateMeta.template_cls may name."""
    TEMPLATE_CLASSES[name] = template_class


def get_template(template_type: str | None, tokenizer: PreTrainedTokenizerBase, **options: object) -> Template:
    """Make the template of a type for a tokenizer; None, of a model that may be of several types: its own chat template.

    Args: options: see TemplateOptions.
    Raises: UsageError for an unknown type (the nearest is named) or value, or where there is no chat template.
    """
    template_type = template_type or JINJA
    if template_type == JINJA:
        options["template_backend"] = "jinja"
    meta = get_template_meta(template_type)
    template_class = TEMPLATE_CLASSES.get(meta.template_cls)
    if template_class is None:
        raise UsageError(
            f"template {meta.template_type!r} names class {meta.template_cls!r}; known: {', '.join(TEMPLATE_CLASSES)}; "
            "call register_template_class first"
        )
    return template_class(meta, tokenizer, **options)
