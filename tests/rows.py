"""Training data that several tests share."""

from __future__ import annotations

from typing import Any


def preference_rows(count: int) -> list[dict[str, Any]]:
    """Conversations with a rejected answer each; answers of both kinds have several lengths."""
    return [
        {"messages": [{"role": "user", "content": f"Who are you? {i}"},
                      {"role": "assistant", "content": "I am Swifty. " * (i % 3 + 1)}],
         "rejected_response": "No idea" + " at all" * (i % 4)}
        for i in range(count)
    ]  # fmt: skip
