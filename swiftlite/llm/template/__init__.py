"""Chat templates: registry, text, token ids, labels, batches."""

from swiftlite.families.templates import TEMPLATE_MAPPING, get_template_meta, register_template
from swiftlite.llm.template.base import IGNORE_INDEX, MaxLengthError, Template
from swiftlite.llm.template.register import TEMPLATE_CLASSES, get_template, register_template_class
from swiftlite.llm.template.thinking import ThinkingTemplate

__all__ = [
    "IGNORE_INDEX",
    "TEMPLATE_CLASSES",
    "TEMPLATE_MAPPING",
    "MaxLengthError",
    "Template",
    "ThinkingTemplate",
    "get_template",
    "get_template_meta",
    "register_template",
    "register_template_class",
]
