"""What servers read from a trained checkpoint: a chat template that writes what was trained, and where answers end.

A base model taught to chat has neither; its checkpoint gets both.
"""

from __future__ import annotations

from swiftlite.checkpoint.chat import Chat
from swiftlite.llm.model.loader import id_of
from swiftlite.llm.template.base import Template
from swiftlite.utils.logger import get_logger


def trained_chat(template: Template) -> Chat | None:
    """What training with this template teaches; None for training on plain text."""
    if not template.use_chat_template:
        return None
    if template.traits.end:
        end: int | None = id_of(template.tokenizer, template.traits.end)
    else:
        end = template.tokenizer.eos_token_id if template.suffix == template.tokenizer.eos_token else None
    if end is None:
        get_logger().warning(
            "%s ends answers with text that is not a special token: servers need it as a stop word", template.chat.name
        )
    return Chat(template.chat.registered, end)
