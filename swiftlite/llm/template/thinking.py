"""ThinkingTemplate: models that write their thoughts between <think> and </think> before they answer."""

from __future__ import annotations

from swiftlite.llm.template.base import Template
from swiftlite.llm.template.messages import Message, split_thinking


class ThinkingTemplate(Template):
    """A Template whose generated answers are split into thoughts and answer.

    What of the thoughts is written for earlier turns, and what `enable_thinking` does, is the chat template's.
    """

    def parse_response(self, text: str) -> Message:
        """The assistant message of a generated text; `reasoning_content` holds the thoughts, where there are any."""
        thoughts, content = split_thinking(text)
        message: Message = {"role": "assistant", "content": content}
        if thoughts:
            message["reasoning_content"] = thoughts.strip("\n")
        return message
