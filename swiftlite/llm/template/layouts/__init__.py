"""Layouts: how each template writes a conversation. `LAYOUTS` maps TemplateMeta.layout to the function."""

from __future__ import annotations

from swiftlite.llm.template.layouts import chatml, deepseek, glm, llama, rounds
from swiftlite.llm.template.layouts.conversation import Conversation, Layout, Piece

LAYOUTS: dict[str, Layout] = {
    "rounds": rounds.rounds,
    "chatml": chatml.chatml,
    "internlm2": chatml.internlm2,
    "yi": chatml.yi,
    "qwen2_5": chatml.qwen2_5,
    "qwq": chatml.qwq,
    "qwen3": chatml.qwen3,
    "qwen3_thinking": chatml.qwen3_thinking,
    "qwen3_nothinking": chatml.qwen3_nothinking,
    "llama": llama.llama,
    "llama3": llama.llama3,
    "llama3_1": llama.llama3_1,
    "deepseek": deepseek.deepseek,
    "deepseek_r1": deepseek.deepseek_r1,
    "ernie": deepseek.ernie,
    "numina": deepseek.numina,
    "glm4_5": glm.glm4_5,
}

# Layouts that print the list of tools, and those that print calls and results.
PRINTS_TOOLS = frozenset({"qwen2_5", "qwq", "qwen3", "qwen3_thinking", "qwen3_nothinking", "llama3_1", "glm4_5"})
PRINTS_CALLS = PRINTS_TOOLS | {"deepseek_r1"}

__all__ = ["LAYOUTS", "PRINTS_CALLS", "PRINTS_TOOLS", "Conversation", "Layout", "Piece"]
