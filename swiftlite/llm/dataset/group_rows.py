"""Any row of texts that belong together -> one form, for embedding models and rerankers; rows that fit none raise RowError.

A standard row holds `messages` (the query or anchor), `positive_messages` and `negative_messages` (each a list of
conversations: documents, or texts near and far), and where given `label`, a number: how well the positive fits.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from swiftlite.llm.dataset.preprocess import Message, Row, RowError, conversation, is_missing, plain_label
from swiftlite.utils.text import short

# Columns by which each part is known, of ms-swift, sentence-transformers, FlagEmbedding and MTEB; the first that is there.
_QUERIES = ("query", "anchor", "question", "sentence1", "sentence_A", "text1", "prompt")
_POSITIVES = ("positive_messages", "positive", "pos", "response", "answer", "sentence2", "sentence_B", "text2", "document",
              "passage")  # fmt: skip
_NEGATIVES = ("negative_messages", "negative", "neg", "rejected_messages", "rejected_response", "rejected")
_NUMBERED = re.compile(r"negative_\d+")
_LABELS = ("label", "score", "similarity_score")
_MEDIA = re.compile(r"(positive_|negative_)?(images?|videos?|audios?)")


def group_row(row: object, columns: Mapping[str, str] | None = None, answered: bool = True) -> Row:
    """Bring a row into the standard form. columns: old column name -> new one, applied first. answered: False for texts
    that a model is asked about: nothing but the query need be there. Raises: RowError with the reason."""
    if not isinstance(row, Mapping):
        raise RowError("not an object", type(row).__name__)
    named = {(columns or {}).get(key, key): value for key, value in row.items() if not is_missing(value)}
    media = next((key for key, value in named.items() if value and _MEDIA.fullmatch(str(key))), None)
    if media:
        raise RowError("has images, video or sound, which are not trained on", f"column {media}")
    query, positives = _query(named)
    negatives = _documents(named, next((key for key in _NEGATIVES if key in named), None), "negative")
    for key in sorted(filter(lambda key: _NUMBERED.fullmatch(str(key)), named), key=lambda key: int(key[9:])):
        negatives += _documents(named, key, "negative")
    if not positives and answered:
        raise RowError("no positive", f"columns {', '.join(sorted(map(str, named)))[:200]}; give positive_messages, "
                       "positive or response, or rename with --columns")  # fmt: skip
    out: Row = {"messages": query, "positive_messages": positives, "negative_messages": negatives}
    label = next((key for key in _LABELS if key in named), None)
    if label is not None:
        out["label"] = _number(named[label], label)
    return out


def _query(row: Row) -> tuple[list[Message], list[list[Message]]]:
    """The query and the documents that fit it. A conversation that ends with an answer is a query and its document."""
    given = next((key for key in _POSITIVES if key in row), None)
    positives = _documents(row, given, "positive")
    if "messages" in row:
        messages = conversation(row["messages"], None)
        if not positives and len(messages) > 1 and messages[-1]["role"] == "assistant":
            positives, messages = [messages[-1:]], messages[:-1]
    else:
        key = next((key for key in _QUERIES if key in row), None)
        if key is None:
            columns = ", ".join(sorted(map(str, row)))[:200] or "none"
            raise RowError("no known format", f"columns {columns}; use messages and positive_messages, query and response, "
                           "anchor and positive, or --columns")  # fmt: skip
        value = row[key]
        messages = conversation([{"role": "user", "content": value}] if isinstance(value, str) else value, None)
    system = row.get("system")
    if isinstance(system, str) and system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    if not text_of(messages):
        raise RowError("the query is empty")
    return messages, positives


def _documents(row: Row, key: str | None, name: str) -> list[list[Message]]:
    """A column's documents: a text, a conversation, or a list of either."""
    value = row[key] if key is not None else []
    if isinstance(value, str | Mapping):
        value = [value]
    if not isinstance(value, list | tuple):
        raise RowError(f"{name} is not text", f"{key} is {type(value).__name__}")
    if value and all(isinstance(item, Mapping) for item in value):
        value = [value]  # one conversation
    documents = [
        conversation([{"role": "assistant", "content": item}] if isinstance(item, str) else item, None)
        for item in value
    ]
    if not all(map(text_of, documents)):
        raise RowError(f"a {name} is empty")
    return documents


def _number(value: object, column: str) -> float:
    label = plain_label(value)
    if not isinstance(label, int | float) or not math.isfinite(label):
        raise RowError("label is not a number", f"{column} is {short(ascii(value))}")
    return float(label)


def text_of(messages: list[Message]) -> str:
    """A conversation as plain text: what is said, with blanks between; so Qwen3-Embedding puts an instruction first."""
    texts = (str(message.get("content") or "") for message in messages)
    return " ".join(text for text in texts if text.strip())
