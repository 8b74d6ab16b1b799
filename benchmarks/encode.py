"""Speed and memory of preparing data.

    python benchmarks/encode.py TOKENIZER_DIR --template qwen3 --rows 20000
    python benchmarks/encode.py TOKENIZER_DIR --template qwen3 --stream 1000000

TOKENIZER_DIR: a folder with tokenizer.json; its chat template, or --jinja FILE, is what plain transformers uses. Rows are
made on the spot, the same ones for every line of the table; every line runs in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

WORDS = (
    "the of and to in is that for it as was with be by on not he his but at are this have from or had an they which one "
    "you were her all she there would their we him been has when who will more no if out so said what up its about into "
    "than them can only other new some could time these two may then do first any my now such like our over man me even "
    "most made after also did many before must through back years where much your way well down should because each "
    "just those people how too little state good very make world still own see men work long get here between both life "
    "being under never day same another know while last might us great old year off come since against go came right "
    "used take three"
).split()


def make_rows(count: int, words: int) -> list[dict[str, Any]]:
    rng = random.Random(0)

    def text(size: int) -> str:
        return " ".join(rng.choices(WORDS, k=max(1, int(rng.gammavariate(2, size / 2))))).capitalize() + "."

    return [
        {
            "messages": [
                {"role": "system", "content": "You are a helpful assistant."},
                {"role": "user", "content": text(words // 3)},
                {"role": "assistant", "content": text(words)},
                {"role": "user", "content": text(words // 3)},
                {"role": "assistant", "content": text(words)},
            ]
        }
        for _ in range(count)
    ]


def load(options: argparse.Namespace) -> tuple[Any, Any]:
    from transformers import PreTrainedTokenizerFast

    from swiftlite.llm.template import get_template

    tokenizer = PreTrainedTokenizerFast.from_pretrained(options.tokenizer)
    if options.jinja:
        tokenizer.chat_template = Path(options.jinja).read_text(encoding="utf-8")
    return tokenizer, get_template(options.template, tokenizer)


def plain(options: argparse.Namespace) -> tuple[int, float]:
    """What a script does: each row through apply_chat_template. No labels."""
    tokenizer, _ = load(options)
    rows = make_rows(options.rows, options.words)
    tokenizer.apply_chat_template(rows[0]["messages"], tokenize=True, return_dict=False)
    began = time.perf_counter()
    tokens = sum(len(tokenizer.apply_chat_template(row["messages"], tokenize=True, return_dict=False)) for row in rows)
    return tokens, time.perf_counter() - began


def encode(options: argparse.Namespace, num_proc: int) -> tuple[int, float]:
    from swiftlite.llm.dataset import EncodedDataset

    _, template = load(options)
    rows = make_rows(options.rows, options.words)
    template.encode(rows[0])
    began = time.perf_counter()
    dataset = EncodedDataset(rows, template, num_proc=num_proc)
    return sum(dataset.lengths), time.perf_counter() - began


def stream(options: argparse.Namespace, path: str) -> tuple[int, float]:
    from swiftlite.llm.dataset import StreamedDataset
    from swiftlite.llm.dataset.loader import ReadOptions, RowStream

    _, template = load(options)
    data = StreamedDataset(
        lambda state: RowStream([path], ReadOptions(streaming=True), state=state), template, capacity=2048
    )
    began, rows, position, tokens = time.perf_counter(), 0, 0, 0
    while rows < options.stream:
        item = data[position]
        position, rows, tokens = position + 1, rows + len(item["sample_lengths"]), tokens + item["length"]
    return tokens, time.perf_counter() - began


def child(queue: Any, run: Callable[..., tuple[int, float]], arguments: tuple[Any, ...]) -> None:
    result = run(*arguments)
    queue.put((*result, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6))


def measure(run: Callable[..., tuple[int, float]], *arguments: Any) -> tuple[int, float, float]:
    """(tokens, seconds, peak GB) of a run in a process of its own."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=child, args=(queue, run, arguments))
    process.start()
    result = queue.get()
    process.join()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer")
    parser.add_argument("--template", default="qwen3")
    parser.add_argument("--jinja")
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--words", type=int, default=120, help="words of an answer on average")
    parser.add_argument("--stream", type=int, help="stream and pack this many short rows instead")
    options = parser.parse_args()
    if options.stream:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "rows.jsonl"
            with path.open("w") as file:
                for row in make_rows(10_000, 12) * (options.stream // 10_000):
                    file.write(json.dumps(row) + "\n")
            size = path.stat().st_size / 1e6
            tokens, seconds, memory = measure(stream, options, str(path))
        print(f"{options.stream} rows, {size:.0f} MB, streamed and packed: {options.stream / seconds:.0f} rows/s, "
              f"{tokens / seconds:.0f} tokens/s, peak memory {memory:.2f} GB")  # fmt: skip
        return
    print("| | rows/s | tokens/s | beside plain | peak GB |\n|---|---|---|---|---|")
    base = 0.0
    lines: list[tuple[str, Callable[..., Any], tuple[Any, ...]]] = [
        ("`apply_chat_template(tokenize=True)`, no labels", plain, (options,)),
        ("swiftlite, ids and labels, 1 process", encode, (options, 1)),
        ("swiftlite, ids and labels, 2 processes", encode, (options, 2)),
    ]
    for name, run, arguments in lines:
        tokens, seconds, memory = measure(run, *arguments)
        rate = options.rows / seconds
        base = base or rate
        print(f"| {name} | {rate:.0f} | {tokens / seconds:.0f} | {rate / base:.2f} | {memory:.2f} |", flush=True)


if __name__ == "__main__":
    main()
