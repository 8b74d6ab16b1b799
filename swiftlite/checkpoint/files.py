"""Which files of a directory are a model's, and how they are copied: config, tokenizer, code; none of it is executed.

Everything else stays where it is: a run's directory also holds logs, plots, arguments and rows of training data.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from swiftlite.checkpoint.info import with_changes
from swiftlite.families.hf_config import is_backbone
from swiftlite.utils.errors import CheckpointError, ConfigError
from swiftlite.utils.io import blame, is_inside, read_json, write_json
from swiftlite.utils.logger import warn_once
from swiftlite.utils.types import Config, Json

if TYPE_CHECKING:
    import torch

CONFIG = "config.json"
SIDE_FILES = (
    CONFIG, "generation_config.json", "configuration.json", "*preprocessor_config.json", "processor_config.json",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "*.model", "*.tiktoken", "tekken.json", "chat_template.jinja", "chat_template.json",
    "README.md", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip
WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")
BIN_WEIGHTS = ("pytorch_model.bin", "pytorch_model-*-of-*.bin", "pytorch_model.bin.index.json")
SENTENCE_FILES = ("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json")
POOLING = "1_Pooling"  # how these files call the directory of what is taken of a text's tokens
ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")


def side_files(directory: Path) -> list[Path]:
    """Config, tokenizer, licence and, where config or tokenizer name some (`auto_map`), code files; by name."""
    code = ("*.py",) if any(_names_code(directory / name) for name in (CONFIG, "tokenizer_config.json")) else ()
    return _matching(directory, (*SIDE_FILES, *code))


def published_files(directory: Path) -> list[Path]:
    """What of a model's or an adapter's directory belongs on a hub: side files and weights, no state of a training."""
    weights = _weights(directory, WEIGHTS) or _weights(directory, BIN_WEIGHTS)
    return sorted({*side_files(directory), *weights, *_matching(directory, ADAPTER), *sentence_files(directory)})


def sentence_files(directory: Path) -> list[Path]:
    """What sentence-transformers reads of an embedding model, or of its adapter, besides what transformers does."""
    pooling = directory / POOLING / CONFIG
    return [*_matching(directory, SENTENCE_FILES), *([pooling] if is_inside(pooling, directory) else [])]


def _weights(directory: Path, patterns: Sequence[str]) -> list[Path]:
    """The single file, as transformers prefers it, else shards by pattern or by index. patterns: single, shards, index."""
    single, _, index = (directory / pattern for pattern in patterns)
    if single.is_file():
        return [single]
    named = _json(index).get("weight_map")
    names = {Path(str(name)).name for name in named.values()} if isinstance(named, dict) else set()
    return _matching(directory, (*patterns, *names))


def _matching(directory: Path, patterns: Iterable[str]) -> list[Path]:
    patterns = tuple(patterns)
    found = (p for p in directory.iterdir() if any(fnmatchcase(p.name, pattern) for pattern in patterns))
    files = sorted(path for path in found if path.is_file())
    for path in files:
        if not is_inside(path, directory):
            warn_once(
                f"{path} is left out: a link out of the model's directory; put the file itself there if it is meant"
            )
    return [path for path in files if is_inside(path, directory)]


_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
_NUMBERS = (
    "temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "repetition_penalty",
    "length_penalty", "no_repeat_ngram_size", "max_length", "max_new_tokens", "min_length", "min_new_tokens", "num_beams",
)  # fmt: skip
_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_TEXTS = ("chat_template.jinja", "vocab.txt", "merges.txt")


def check_side_files(directory: Path) -> None:
    """Read the side files of a model as whoever uses them will, before any work is done.

    Raises: CheckpointError naming the first that is damaged, and what in it is of another kind than it must be.
    """
    for path in side_files(directory):
        if path.name in _TEXTS:
            try:
                path.read_text(encoding="utf-8")
            except ValueError as error:
                raise CheckpointError(f"{path} is not UTF-8 ({error}); download or copy the file again") from None
        if path.suffix == ".json":
            content = read_json(path)
            with blame(path):
                if path.name in _CHECKS:
                    _CHECKS[path.name](content)


def _check_generation(content: Config) -> None:
    for key in _IDS:
        if any(
            not isinstance(i, int) or isinstance(i, bool) or abs(i) >= 1 << 31 for i in end_tokens(content.get(key))
        ):
            raise ValueError(f"{key} is {content[key]!r}; it must be a token's number or a list of them")
    for key in _NUMBERS:
        value = content.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ValueError(f"{key} is {value!r}; it must be a number")


def _check_tokenizer_config(content: Config) -> None:
    _ = {int(number): str(token["content"]) for number, token in (content.get("added_tokens_decoder") or {}).items()}
    template = content.get("chat_template")
    named = [entry["template"] for entry in template] if isinstance(template, list) else [template]
    if not all(text is None or isinstance(text, str) for text in named):
        raise TypeError(f"chat_template is a {type(template).__name__}")
    _check_tokens(content)


def _check_tokens(content: Config) -> None:
    for key in _TOKENS:
        value = content.get(key) or ""
        if not isinstance(value["content"] if isinstance(value, dict) else value, str):
            raise ValueError(f"{key} is {value!r}; it must be a token's text")


def _check_tokenizer(content: Config) -> None:
    _ = {str(token["content"]): int(token["id"]) for token in content.get("added_tokens") or ()}
    if not isinstance(content["model"], dict):
        raise TypeError(f"model is a {type(content['model']).__name__}")


def _check_ids(content: Config) -> None:
    wrong = next((token for token, number in content.items() if not isinstance(number, int)), None)
    if wrong is not None:
        raise ValueError(f"{wrong!r} has the number {content[wrong]!r}; it must be a whole number")


_CHECKS: dict[str, Callable[[Mapping[str, object]], None]] = {
    "generation_config.json": _check_generation, "tokenizer_config.json": _check_tokenizer_config,
    "special_tokens_map.json": _check_tokens, "tokenizer.json": _check_tokenizer, "vocab.json": _check_ids,
    "added_tokens.json": _check_ids,
}  # fmt: skip


def _names_code(path: Path) -> bool:
    return "auto_map" in _json(path)


def _json(path: Path) -> Json:
    """The object in a file; {} where there is none, as whoever needs it will say."""
    try:
        return read_json(path)
    except (OSError, CheckpointError):
        return {}


def copy_side_files(
    source: Path, target: Path, changes: Mapping[str, object], dtype: torch.dtype | None = None
) -> None:
    """Copy `side_files`; change only the named keys of config.json, and its dtype to that of the weights.

    quantization_config goes unless a change names another: weights are written dequantised.
    """
    files = side_files(source)
    if source / CONFIG not in files:
        raise ConfigError(f"{source / CONFIG} is missing, or a link out of its directory; put the file itself there")
    for path in files:
        shutil.copyfile(path, target / path.name)
    update_config(target / CONFIG, {"quantization_config": None, **changes}, dtype)
    if is_backbone(read_json(target / CONFIG)):
        copy_sentence_files(source, target)


def copy_sentence_files(source: Path, target: Path) -> None:
    """`sentence_files` next to what the model or adapter becomes, if there are some."""
    for path in sentence_files(source):
        copied = target / path.relative_to(source)
        copied.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copied)


def update_config(path: Path, changes: Mapping[str, object], dtype: torch.dtype | None = None) -> None:
    """Change keys of a config.json, None removes one; everything else keeps its text order.

    Args: dtype: of the weights, named under whichever of `dtype` and `torch_dtype` there is, in nested configs too.
    """
    config = read_json(path)
    before = json.dumps(config)
    config = with_changes(config, changes)
    if dtype is not None:
        name = str(dtype).removeprefix("torch.")
        if not {"dtype", "torch_dtype"} & config.keys() and name != "float32":  # which is what none means
            config["torch_dtype"] = name
        _name_dtype(config, name)
    if json.dumps(config) != before:
        write_json(path, config)


def _name_dtype(config: Json, name: str) -> None:
    for key, value in config.items():
        if key in ("dtype", "torch_dtype"):
            config[key] = name
        elif isinstance(value, dict):
            _name_dtype(value, name)


def end_tokens(value: int | list[int] | None) -> list[int]:
    """Ids under `eos_token_id`, which is absent, one id or a list of them."""
    return [] if value is None else value if isinstance(value, list) else [value]


def main_dtype(tensors: Iterable[tuple[torch.dtype, int]]) -> torch.dtype:
    """dtype of most numbers; tensors: (dtype, numel) of each. Some, such as router biases, may have another."""
    totals: dict[torch.dtype, int] = {}
    for dtype, numel in tensors:
        totals[dtype] = totals.get(dtype, 0) + numel
    return max(totals, key=lambda dtype: totals[dtype])
