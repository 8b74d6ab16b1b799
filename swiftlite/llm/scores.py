"""How near an answer is to the reference: equal, the same choice, the same words in order (Rouge)."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence

from swiftlite.llm.template.messages import split_thinking
from swiftlite.utils.errors import UsageError
from swiftlite.utils.types import Json

Pairs = Sequence[tuple[str, str]]  # (answer, reference)

# "the answer is (B)", "**答案**：C", else a letter that stands alone; A as an article is none.
_SAID = re.compile(
    r"(?:answer|choice|option|答案)[^A-Za-z0-9]*(?:is|应?[是为]|[:：])?[^A-Za-z0-9]*([A-Z])(?![A-Za-z])", re.I
)
_ALONE = re.compile(r"(?<![A-Za-z0-9])\(?([A-Z])(?:[).:：、]|\s*$|\n)")
# Words, and single characters of scripts that write none apart.
_WORDS = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W_\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+")


class Judged:
    """Answered rows beside their references; as text what --metric says of them. Raises: UsageError without rouge-score."""

    def __init__(self, metric: str) -> None:
        self.metric = {"acc": "exact_match"}.get(metric, metric)
        self.pairs: list[tuple[str, str]] = []
        scores(self.metric, [("", "")])  # what is missing is told before anything is answered

    def add(self, row: Json) -> Json:
        """Note a row with `response` and `labels`. Returns: it."""
        if row.get("response") is not None and row.get("labels") is not None:
            self.pairs.append((row["response"], row["labels"]))
        return row

    def __str__(self) -> str:
        if not self.pairs:
            return "--metric: no row has an answer to compare with"
        found = ", ".join(f"{name} {value:.4f}" for name, value in scores(self.metric, self.pairs).items())
        return f"{found} of {len(self.pairs)} rows"


def scores(metric: str, pairs: Pairs) -> dict[str, float]:
    """Means over the pairs, from 0 to 1. Thoughts of an answer do not count."""
    score: dict[str, Callable[[Pairs], dict[str, float]]] = {
        "exact_match": exact_match,
        "choice": choice,
        "rouge": rouge,
    }
    return score[metric]([(split_thinking(answer)[1], split_thinking(wanted)[1]) for answer, wanted in pairs])


def exact_match(pairs: Pairs) -> dict[str, float]:
    """Equal texts; width of characters, white space at the ends and in a row do not count."""
    return {"exact_match": _mean([float(_plain(answer) == _plain(wanted)) for answer, wanted in pairs])}


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).split())


def choice(pairs: Pairs) -> dict[str, float]:
    """The same letter is chosen; an answer without one is wrong, a reference without one does not count.

    Also `choice_rows`, how many counted.
    """
    wanted = [(chosen(answer), letter) for answer, reference in pairs if (letter := chosen(reference)) is not None]
    return {"choice_accuracy": _mean([float(a == b) for a, b in wanted]), "choice_rows": len(wanted)}


def chosen(text: str) -> str | None:
    """The letter that a text chooses: after `answer is`, the last time; else the first that stands alone."""
    text = unicodedata.normalize("NFKC", text).replace("*", "").strip()
    said = _SAID.findall(text)
    if said:
        return str(said[-1]).upper()
    found = _ALONE.search(text)
    return found[1] if found else None


class _Tokenizer:
    """rouge-score's own keeps nothing but Latin letters and digits."""

    def tokenize(self, text: str) -> list[str]:
        return _WORDS.findall(text.lower())


def rouge(pairs: Pairs) -> dict[str, float]:
    """F1 of Rouge-1, Rouge-2 and Rouge-L by rouge-score, without stemming; each character of Chinese is a word."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise UsageError("--metrics rouge: is computed by rouge-score; pip install 'swiftlite[eval]'") from None
    names = ["rouge1", "rouge2", "rougeL"]
    scorer = RougeScorer(names, tokenizer=_Tokenizer())
    found = [scorer.score(wanted, answer) for answer, wanted in pairs]
    return {name: _mean([score[name].fmeasure for score in found]) for name in names}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")
