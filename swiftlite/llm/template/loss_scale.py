"""Loss weights: a strategy says which answers are trained on, patterns say how much each part of an answer counts.

`STRATEGY[+NAME...]`: strategies are default, last_round and all; a name is one of PATTERNS, one that
`register_loss_scale` added, or a JSON file in the same form. Weights of several names are multiplied.
"""

from __future__ import annotations

import difflib
import json
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from swiftlite.utils.errors import UsageError
from swiftlite.utils.text import one_line

STRATEGIES = ("default", "last_round", "all")

# {pattern: [weight]}: a regular expression and the weight of what it matches. {keyword: [its weight, weight of what
# follows, up to the next keyword]}: fixed text. What no pattern touches weighs 1.
Weights = Mapping[str, Sequence[float]]
PATTERNS: dict[str, Weights] = {
    "ignore_empty_think": {r"\s*<think>\s*</think>\s*": [0.0]},
    # Thoughts reach to their end tag; the generation prompt may have opened them.
    "ignore_think": {r"\A.*?</think>\s*": [0.0]},
    "hermes": {r"<tool_call>.+?</tool_call>": [2.0]},
    "qwen": {"✿FUNCTION✿:": [2.0, 2.0], "✿ARGS✿:": [2.0, 2.0], "✿RETURN✿:": [1.0, 1.0], "✿RESULT✿:": [2.0, 0.0]},
    "react": {
        "Action:": [2.0, 2.0], "Action Input:": [2.0, 2.0], "Thought:": [1.0, 1.0], "Final Answer:": [1.0, 1.0],
        "Observation:": [2.0, 0.0],
    },
    "alpha_umi": {
        "Action:": [2.0, 2.0], "Action Input:": [2.0, 2.0], "Thought:": [1.0, 1.0], "Final Answer:": [1.0, 1.0],
        "Observation:": [2.0, 0.0], "Next:": [2.0, 2.0],
    },
}  # fmt: skip


def register_loss_scale(name: str, weights: Weights) -> None:
    """Add weights that `--loss_scale` may name. Raises: UsageError for a pattern or weight that is none."""
    PATTERNS[name] = _checked(weights, f"loss scale {name!r}")


def parse_loss_scale(text: str) -> tuple[str, list[Weights]]:
    """`last_round+hermes` -> ("last_round", [weights of hermes]). Raises: UsageError naming the nearest."""
    names = text.split("+")
    strategy = names.pop(0) if names[0] in STRATEGIES else "default"
    return strategy, [_named(name, text) for name in names if name != "base"]


def _named(name: str, text: str) -> Weights:
    if name in PATTERNS:
        return PATTERNS[name]
    if name.endswith(".json"):
        path = Path(name).expanduser()
        try:
            return _checked(json.loads(path.read_text(encoding="utf-8")), f"--loss_scale {path}")
        except (OSError, ValueError) as error:
            if isinstance(error, UsageError):
                raise
            raise UsageError(
                f"--loss_scale {name}: cannot be read ({one_line(error)}); give {{pattern: [weight]}}"
            ) from None
    known = [*STRATEGIES, *PATTERNS]
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}, or a .json file"
    raise UsageError(f"--loss_scale {text!r}: {name!r} is unknown; {hint}")


def _checked(weights: object, what: str) -> Weights:
    if not isinstance(weights, Mapping) or not weights:
        raise UsageError(f"{what}: must be an object {{pattern: [weight]}} or {{keyword: [weight, weight after it]}}")
    for pattern, values in weights.items():
        is_numbers = isinstance(values, (list, tuple)) and all(isinstance(v, (int, float)) and v >= 0 for v in values)
        if not is_numbers or len(values) not in (1, 2):
            raise UsageError(f"{what}: {pattern!r} has weights {values!r}; give one or two numbers, 0 or more")
        try:
            re.compile(pattern if len(values) == 1 else re.escape(pattern))
        except re.error as error:
            raise UsageError(f"{what}: {pattern!r} is not a regular expression ({error})") from None
    return weights


Span = tuple[int, int, float]


def weigh(text: str, start: int, end: int, weight: float, scales: Iterable[Weights]) -> Iterator[Span]:
    """Divide an answer, text[start:end], into parts of one weight: (start, end, weight), those of weight 0 left out."""
    answer = text[start:end]
    divisions = [_division(answer, scale) for scale in scales]
    cuts = sorted({0, len(answer), *(at for division in divisions for at, _ in division)})
    for a, b in zip(cuts, cuts[1:], strict=False):
        value = weight
        for division in divisions:
            value *= division[bisect_right(division, a, key=lambda part: part[0]) - 1][1]
        if value:
            yield start + a, start + b, value


def _division(answer: str, scale: Weights) -> list[tuple[int, float]]:
    """(where a part begins, its weight), ascending, the first at 0."""
    marks: list[tuple[int, int, float, float]] = []  # begin, end, weight, weight from the end on
    keywords = sorted((key for key, value in scale.items() if len(value) == 2), key=len, reverse=True)
    if keywords:
        for match in re.finditer("|".join(map(re.escape, keywords)), answer):
            own, after = scale[match[0]]
            marks.append((match.start(), match.end(), own, after))
    for pattern, values in scale.items():
        if len(values) == 1:
            for match in re.finditer(pattern, answer, re.DOTALL):
                if match.end() > match.start():
                    marks.append((match.start(), match.end(), values[0], 1.0))
    parts, reached = [(0, 1.0)], 0
    for begin, end, own, after in sorted(marks):
        if begin < reached:  # inside what another pattern has weighed already
            continue
        parts += [(begin, own), (end, after)]
        reached = end
    return parts
