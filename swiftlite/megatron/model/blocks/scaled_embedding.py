"""A factor on embeddings that has the dtype of the weights (Gemma: the root of the hidden size, 55.5 for 3072 in bf16)."""

from __future__ import annotations

import torch

from swiftlite.arguments.parallel import MegatronArguments
from swiftlite.megatron.model.chunked_loss import GPTModel


def adapt(model: GPTModel, args: MegatronArguments) -> None:
    if hasattr(model, "embedding"):
        factor = torch.tensor(args.description.embedding_multiplier)
        model.embedding.register_forward_hook(lambda _, __, hidden: hidden * factor.to(hidden.dtype).item())
