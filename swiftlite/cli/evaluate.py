"""`swiftlite eval`: numbers of models, side by side. What a directory stands for is made ready as for `deploy`."""

from __future__ import annotations

import gc
import json
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from swiftlite.arguments.evaluate import EvalArguments
from swiftlite.checkpoint.resolve import as_arguments, base_of_adapter
from swiftlite.cli.prepared import Readable, readable
from swiftlite.llm.engines import found
from swiftlite.utils.errors import SwiftliteError, UsageError
from swiftlite.utils.io import read_json, write_json
from swiftlite.utils.logger import get_logger
from swiftlite.utils.types import Json

logger = get_logger()
Results = Mapping[str, Mapping[str, float]]


def eval_main(args: EvalArguments | Sequence[str]) -> Json:
    """Evaluate each model, print a table, write --result_path.

    Returns: {"models": [{"model", "results": {dataset or task: {name: value}}}]}, as it is written.
    """
    args = as_arguments(EvalArguments, args)
    if args.eval_backend == "lm_eval" and found("lm_eval") is None:
        raise UsageError("--eval_backend lm_eval: lm-evaluation-harness is not installed; pip install 'lm-eval[hf]'")
    done = []
    models = [(given, readable(given, args.checkpoint)) for given in args.model]  # before the first is measured
    for given, read in models:
        if args.eval_backend == "lm_eval":
            results: Results = benchmarks(args, read)
        else:
            from swiftlite.llm.evaluate import evaluate

            results = evaluate(args, read.model, read.adapter)
            gc.collect()
        done.append({"model": given, "results": results})
    report: Json = {"models": done}
    print_table(report)
    if args.result_path is not None:
        path = Path(args.result_path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, report)
        logger.info("wrote %s", path)
    return report


def print_table(report: Json) -> None:
    """A row for each dataset and value, a column for each model."""
    from rich.console import Console
    from rich.table import Table

    models: Sequence[Json] = report["models"]
    table = Table("data", "value", *(str(entry["model"]) for entry in models))
    for column in table.columns[2:]:
        column.justify, column.overflow = "right", "fold"
    for data, name in _places(models):
        values = [entry["results"].get(data, {}).get(name) for entry in models]
        table.add_row(data, name, *("" if value is None else f"{value:.6g}" for value in values))
    Console(file=sys.stdout).print(table)


def _places(models: Iterable[Json]) -> list[tuple[str, str]]:
    places = {(data, name): None for entry in models for data, values in entry["results"].items() for name in values}
    return list(places)


def lm_eval_words(args: EvalArguments, read: Readable, output: Path) -> list[str]:
    """The command line of lm-evaluation-harness (0.4.13) for one model."""
    model = read.model or base_of_adapter(read.adapter or Path())
    settings: dict[str, object] = {"pretrained": model}
    if "torch_dtype" in args.given:
        settings["dtype"] = args.torch_dtype
    if args.trust_remote_code:
        settings["trust_remote_code"] = True
    if args.infer_backend == "vllm":
        more = {"tensor_parallel_size": args.tensor_parallel_size, "max_model_len": args.max_model_len,
                "gpu_memory_utilization": args.gpu_memory_utilization, "lora_local_path": read.adapter}  # fmt: skip
    else:
        more = {"peft": read.adapter, "max_length": args.max_model_len}
    settings |= {name: value for name, value in more.items() if value is not None}
    words = ["lm_eval", "--model", "vllm" if args.infer_backend == "vllm" else "hf", "--model_args",
             ",".join(f"{name}={value}" for name, value in settings.items()), "--tasks", ",".join(args.tasks),
             "--batch_size", str(args.max_batch_size)]  # fmt: skip
    if args.num_fewshot is not None:
        words += ["--num_fewshot", str(args.num_fewshot)]
    if args.limit is not None:
        words += ["--limit", f"{args.limit:g}"]
    if args.use_chat_template:
        words += ["--apply_chat_template"]
    return [*words, "--output_path", str(output), *args.engine_args]


def benchmarks(args: EvalArguments, read: Readable) -> Results:
    """What lm-evaluation-harness measures, run as a child. Raises: SwiftliteError if it fails or writes no result."""
    with tempfile.TemporaryDirectory() as folder:
        words = lm_eval_words(args, read, Path(folder))
        logger.info("%s", shlex.join(words))
        code = subprocess.run([str(found("lm_eval")), *words[1:]], check=False).returncode
        files = sorted(Path(folder).rglob("results*.json"))
        if code or not files:
            raise SwiftliteError(f"lm_eval ended with {code} and {len(files)} files of results: {shlex.join(words)}")
        tasks: Mapping[str, Json] = read_json(files[-1])["results"]
    return {
        task: {name.removesuffix(",none"): value for name, value in values.items() if _is_number(value)}
        for task, values in tasks.items()
    }


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and json.dumps(value) != "NaN"
