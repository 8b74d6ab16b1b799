"""An objective: `--external_plugins examples/plugins/objective.py --token_loss focal`, with transformers and on Megatron.

Focal loss (arXiv 1708.02002): tokens that the model is sure of count less.
"""

import torch

from swiftlite import register_objective

GAMMA = 2.0


def focal(losses):
    """Cross entropies of tokens [N] -> what takes their place [N]; its mean over the tokens is minimised."""
    probabilities = torch.exp(-losses)
    return (1 - probabilities) ** GAMMA * losses


register_objective("focal", focal)
