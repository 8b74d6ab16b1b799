"""Speed and memory of preparing data.

    python benchmarks/encode.py --template qwen3 --jinja qwen3.jinja --rows 2000
    python benchmarks/encode.py --tokenizer DIR --template qwen3 --stream 1000000

--jinja: a checkpoint's own chat template; --tokenizer: a folder with tokenizer.json (default: a small one made of the
words). Rows are made on the spot, the same ones for every line of the table; every line runs in a process of its own.
Processor time is that of the process and its children. Another commit's code is measured by PYTHONPATH.
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


def make_rows(count: int, words: int, rounds: int = 3) -> list[dict[str, Any]]:
    """Conversations of a system message and some rounds; answers of about `words` words."""
    rng = random.Random(0)

    def text(size: int) -> str:
        return " ".join(rng.choices(WORDS, k=max(1, int(rng.gammavariate(2, size / 2))))).capitalize() + "."

    def conversation() -> list[dict[str, str]]:
        said = [("user", text(words // 3)) if n % 2 == 0 else ("assistant", text(words)) for n in range(2 * rounds)]
        return [{"role": role, "content": content} for role, content in [("system", "You are helpful."), *said]]

    return [{"messages": conversation()} for _ in range(count)]


def make_tokenizer() -> Any:
    """A byte-level BPE that knows the words as tokens do in real ones, and the special tokens of some templates."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|begin_of_text|>", "<|start_header_id|>",
               "<|end_header_id|>", "<|eot_id|>", "<think>", "</think>"]  # fmt: skip
    trainer = trainers.BpeTrainer(
        special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    bpe.train_from_iterator([" ".join([*WORDS, *map(str.capitalize, WORDS), "."])] * 2, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>", bos_token="<|begin_of_text|>"
    )


def load(options: argparse.Namespace, source: str) -> tuple[Any, Any]:
    """The tokenizer and the template. source: registered, own (--jinja), tagged (own, with generation tags)."""
    from transformers import PreTrainedTokenizerFast

    from swiftlite.llm.template import get_template

    if options.tokenizer:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(options.tokenizer)
    else:
        tokenizer = make_tokenizer()
    if source == "registered":
        tokenizer.chat_template = None
    elif source == "tagged":
        tokenizer.chat_template = get_template(options.template, tokenizer, template_backend="swift").chat.registered
    elif options.jinja:
        tokenizer.chat_template = Path(options.jinja).read_text(encoding="utf-8")
    return tokenizer, get_template(
        options.template, tokenizer, template_backend="swift" if source == "registered" else "jinja"
    )


def plain(options: argparse.Namespace, source: str) -> Any:
    """What a script does: each row through apply_chat_template. No labels."""
    tokenizer, _ = load(options, source)
    rows = make_rows(options.rows, options.words)
    tokenizer.apply_chat_template(rows[0]["messages"], tokenize=True, return_dict=False)
    return timed(
        lambda: sum(
            len(tokenizer.apply_chat_template(row["messages"], tokenize=True, return_dict=False)) for row in rows
        )
    )


def encode(options: argparse.Namespace, source: str, num_proc: int) -> Any:
    from swiftlite.llm.dataset import EncodedDataset

    _, template = load(options, source)
    rows = make_rows(options.rows, options.words)
    template.encode(rows[0])
    return timed(lambda: sum(EncodedDataset(rows, template, num_proc=num_proc).lengths))


def timed(work: Callable[[], int]) -> tuple[int, float, float]:
    """(what `work` returns, its seconds, its processor seconds with those of children that have ended)."""

    def spent() -> float:
        used = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        return sum(usage.ru_utime + usage.ru_stime for usage in used)

    began, before = time.perf_counter(), spent()
    tokens = work()
    return tokens, time.perf_counter() - began, spent() - before


def stream(options: argparse.Namespace, path: str) -> tuple[int, float, float]:
    from swiftlite.llm.dataset import StreamedDataset
    from swiftlite.llm.dataset.loader import ReadOptions, RowStream

    _, template = load(options, "own" if options.jinja else "registered")
    data = StreamedDataset(
        lambda state: RowStream([path], ReadOptions(streaming=True), state=state), template, capacity=2048
    )

    def read() -> int:
        rows, position, tokens = 0, 0, 0
        while rows < options.stream:
            item = data[position]
            position, rows, tokens = position + 1, rows + len(item["sample_lengths"]), tokens + item["length"]
        return tokens

    return timed(read)


def child(queue: Any, run: Callable[..., tuple[int, float, float]], rounds: int, arguments: tuple[Any, ...]) -> None:
    results = [run(*arguments) for _ in range(rounds)]
    tokens, seconds, processor = (min(values) for values in zip(*results, strict=True))
    queue.put((tokens, seconds, processor, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6))


def measure(run: Callable[..., Any], rounds: int, *arguments: Any) -> tuple[int, float, float, float]:
    """(tokens, seconds, processor seconds, peak GB): the least of some runs, all in a process of their own."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=child, args=(queue, run, rounds, arguments))
    process.start()
    while queue.empty() and process.is_alive():
        process.join(0.1)
    if process.exitcode:
        raise SystemExit("a line of the table failed")
    result = queue.get()
    process.join()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer")
    parser.add_argument("--template", default="qwen3")
    parser.add_argument("--jinja")
    parser.add_argument("--sources", nargs="*", default=["registered", "own", "tagged"])
    parser.add_argument("--num_proc", type=int, nargs="*", default=[1])
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=3, help="runs of each line; the fastest counts")
    parser.add_argument("--words", type=int, default=120, help="words of an answer on average")
    parser.add_argument("--stream", type=int, help="stream and pack this many short rows instead")
    options = parser.parse_args()
    if options.stream:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "rows.jsonl"
            with path.open("w") as file:
                for row in make_rows(10_000, 12, 2) * (options.stream // 10_000):
                    file.write(json.dumps(row) + "\n")
            size = path.stat().st_size / 1e6
            tokens, seconds, _, memory = measure(stream, 1, options, str(path))
        print(f"{options.stream} rows, {size:.0f} MB, streamed and packed: {options.stream / seconds:.0f} rows/s, "
              f"{tokens / seconds:.0f} tokens/s, peak memory {memory:.2f} GB")  # fmt: skip
        return
    print("| | rows/s | tokens/s | rows per processor second | peak GB |\n|---|---|---|---|---|")
    lines: list[tuple[str, Callable[..., Any], tuple[Any, ...]]] = []
    if options.jinja:
        lines.append(("`apply_chat_template(tokenize=True)`, no labels", plain, (options, "own")))
    for source in options.sources:
        for processes in options.num_proc:
            if source != "own" or options.jinja:
                name = f"swiftlite, ids and labels, {source} template, {processes} process{'es' * (processes > 1)}"
                lines.append((name, encode, (options, source, processes)))
    for name, run, arguments in lines:
        tokens, seconds, processor, memory = measure(run, options.rounds, *arguments)
        rows = options.rows
        print(f"| {name} | {rows / seconds:.0f} | {tokens / seconds:.0f} | {rows / processor:.0f} | {memory:.2f} |")


if __name__ == "__main__":
    main()
