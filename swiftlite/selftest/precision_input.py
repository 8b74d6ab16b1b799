"""What both models of the precision check are given."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from swiftlite.checkpoint.info import read_config
from swiftlite.checkpoint.vocabulary import rows_of
from swiftlite.families.hf_config import convert_hf_config
from swiftlite.llm.model.loader import load_tokenizer
from swiftlite.llm.template.register import get_template
from swiftlite.utils.errors import TemplateError
from swiftlite.utils.types import Config

NUM_TOKENS = 512


def num_tokens(config: Config, most: int = NUM_TOKENS) -> int:
    """How long a text is that both models are given; of a model with indexers, whose Megatron side has none, no longer
    than what these choose."""
    return min(most, convert_hf_config(config).get("dsa_indexer_topk") or most)


MESSAGES = [
    {"role": "user", "content": "What does a checkpoint converter have to preserve?"},
    {"role": "assistant", "content": "Every weight, bit for bit, and therefore every logit."},
]


def token_ids(hf_dir: Path, args: object) -> Tensor:
    """[1, num_tokens]: a conversation in the model's template where there is a tokenizer, then arbitrary ids."""
    config = read_config(hf_dir)
    rows, length = rows_of(config), num_tokens(config)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, rows, (1, length), generator=generator)
    if any((hf_dir / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        tokenizer = load_tokenizer(str(hf_dir), trust_remote_code=getattr(args, "trust_remote_code", False))
        given = "template" in getattr(args, "given", ())
        text = "\n".join(m["content"] for m in MESSAGES)
        if given or getattr(tokenizer, "chat_template", None):
            name = str(getattr(args, "template", "")) if given else "jinja"
            with suppress(TemplateError):  # which text it is does not matter
                text = get_template(name, tokenizer, template_backend="swift" if given else "jinja").render(MESSAGES)
        encoded = [i for i in tokenizer(text, add_special_tokens=False)["input_ids"] if i < rows]
        count = min(len(encoded), length)
        ids[0, :count] = torch.tensor(encoded[:count], dtype=ids.dtype)
    return ids
