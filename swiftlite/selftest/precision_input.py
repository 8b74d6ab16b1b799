"""What both models of the precision check are given."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from swiftlite.checkpoint.info import read_config
from swiftlite.checkpoint.vocabulary import rows_of
from swiftlite.llm.model.loader import load_tokenizer
from swiftlite.llm.template.register import get_template
from swiftlite.utils.errors import TemplateError

NUM_TOKENS = 512


MESSAGES = [
    {"role": "user", "content": "What does a checkpoint converter have to preserve?"},
    {"role": "assistant", "content": "Every weight, bit for bit, and therefore every logit."},
]


def token_ids(hf_dir: Path, args: object) -> Tensor:
    """[1, NUM_TOKENS]: a conversation in the model's template where there is a tokenizer, then arbitrary ids."""
    rows = rows_of(read_config(hf_dir))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, rows, (1, NUM_TOKENS), generator=generator)
    if any((hf_dir / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        tokenizer = load_tokenizer(str(hf_dir), trust_remote_code=getattr(args, "trust_remote_code", False))
        given = "template" in getattr(args, "given", ())
        text = "\n".join(m["content"] for m in MESSAGES)
        if given or getattr(tokenizer, "chat_template", None):
            name = str(getattr(args, "template", "")) if given else "jinja"
            with suppress(TemplateError):  # which text it is does not matter
                text = get_template(name, tokenizer, template_backend="swift" if given else "jinja").render(MESSAGES)
        encoded = [i for i in tokenizer(text, add_special_tokens=False)["input_ids"] if i < rows]
        count = min(len(encoded), NUM_TOKENS)
        ids[0, :count] = torch.tensor(encoded[:count], dtype=ids.dtype)
    return ids
