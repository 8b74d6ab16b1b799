"""Training data that several tests share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from swiftlite.train.plot import read_run


def preference_rows(count: int) -> list[dict[str, Any]]:
    """Conversations with a rejected answer each; answers of both kinds have several lengths."""
    return [
        {"messages": [{"role": "user", "content": f"Who are you? {i}"},
                      {"role": "assistant", "content": "I am Swifty. " * (i % 3 + 1)}],
         "rejected_response": "No idea" + " at all" * (i % 4)}
        for i in range(count)
    ]  # fmt: skip


# A chat template, and what a run of two steps on PAIRS is told; PAIRS are read by sft, too.
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FLAGS = ["--train_iters", "2", "--global_batch_size", "2", "--micro_batch_size", "2", "--lr", "1e-2", "--max_length",
         "100", "--logging_steps", "1", "--torch_dtype", "float32", "--save_weights_only", "true"]  # fmt: skip
_MESSAGES = [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "I am Swifty."}]
PAIRS = "\n".join(json.dumps({"messages": _MESSAGES, "rejected_response": f"No {i}."}) for i in range(4))


def losses(directory: Path) -> list[float]:
    """Of a run, as it logged them."""
    return [line["loss"] for line in read_run(directory / "logging.jsonl") if "loss" in line]


def answer_rows(count: int) -> list[dict[str, Any]]:
    """Conversations whose answers are each desirable or not; more of the former, questions of several lengths."""
    return [
        {"messages": [{"role": "user", "content": "Who are you? " * (i % 2 + 1) + str(i)},
                      {"role": "assistant", "content": (f"No {i}", "I am Swifty. ")[i % 5 < 3] * (i % 4 + 1)}],
         "label": i % 5 < 3}
        for i in range(count)
    ]  # fmt: skip


# Pairs of different lengths: ranks hold different numbers of tokens.
UNEVEN_PAIRS = [
    {"messages": [{"role": "user", "content": f"What is {i} plus {i}?"},
                  {"role": "assistant", "content": f"It is {2 * i}. " + "The capital of France is Paris. " * (i % 4)}],
     "rejected_response": "No idea" + " at all" * (i % 3)}
    for i in range(11)
]  # fmt: skip

# Texts of different lengths; what is in them says their class.
_WORDS = ("good", "bad at all", "neither of them")
LABELLED = [
    {"messages": [{"role": "user", "content": f"Film {i}: {_WORDS[i % 3]}. " + "It is long. " * (i % 4)}], "label": i % 3}
    for i in range(11)
]  # fmt: skip
_NAMES = "alpha bravo charlie delta echo foxtrot golf hotel india juliett kilo".split()
# Questions, each with an answer of its own and others.
GROUPS = [
    {"query": f"Who is number {i}? {name}", "pos": f"It is{' really' * (i % 3)} {_NAMES[5 * i % 11]}",
     "neg": [_NAMES[i - 5], f"the fox of {i}"][: 1 + i % 2]} for i, name in enumerate(_NAMES)
]  # fmt: skip
