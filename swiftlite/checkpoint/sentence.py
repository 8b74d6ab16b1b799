"""Files by which sentence-transformers loads an embedding model: last token's hidden state, of length 1."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from swiftlite.checkpoint.files import POOLING, SENTENCE_FILES
from swiftlite.checkpoint.new_tokens import copy_tokenizer
from swiftlite.utils.directories import ADAPTER_CONFIG
from swiftlite.utils.io import read_json, write_json

_SETTINGS = SENTENCE_FILES[1:]
# The modules' names in every release; the newest have others, too.
_MODULES = (
    ("", "sentence_transformers.models.Transformer"),
    (POOLING, "sentence_transformers.models.Pooling"),
    ("2_Normalize", "sentence_transformers.models.Normalize"),
)


@dataclass(frozen=True)
class SentenceFiles:
    """What `write_sentence_files` is told of a model in training."""

    width: int
    max_length: int | None

    def write(self, directory: Path, base: Path | None = None) -> None:
        """Into a checkpoint's directory; next to an adapter the tokenizer too, without which it is not loaded.

        base: where the model's own files are, if not there.
        """
        base = base or directory
        write_sentence_files(base, directory, self.width, self.max_length)
        if (directory / ADAPTER_CONFIG).is_file() and not (directory / "tokenizer_config.json").is_file():
            copy_tokenizer(base, directory, {})


def write_sentence_files(base: Path, directory: Path, width: int, max_length: int | None) -> None:
    """Write them next to weights or an adapter. Prompts and lengths of a base model that has such files stay.

    width: numbers of a vector. max_length: tokens to which texts are cut, None: what the model's config allows.
    """
    modules = [{"idx": i, "name": str(i), "path": path, "type": kind} for i, (path, kind) in enumerate(_MODULES)]
    write_json(directory / SENTENCE_FILES[0], modules)
    (directory / POOLING).mkdir(exist_ok=True)
    modes = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens")
    write_json(
        directory / POOLING / "config.json",
        {"word_embedding_dimension": width, **{f"pooling_mode_{mode}": False for mode in modes},
         "pooling_mode_lasttoken": True, "include_prompt": True},
    )  # fmt: skip
    settings, lengths = (read_json(base / name, optional=True) for name in _SETTINGS)
    write_json(directory / _SETTINGS[0], {"prompts": {}, "default_prompt_name": None, **settings,
                                          "similarity_fn_name": "cosine"})  # fmt: skip
    if max_length is not None or lengths:
        known = {"do_lower_case": False, **lengths}
        write_json(directory / _SETTINGS[1], known if max_length is None else {**known, "max_seq_length": max_length})
