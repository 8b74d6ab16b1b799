"""An optimizer: `--external_plugins examples/plugins/optimizer.py --optim momentum`, with transformers.

groups: dicts with `params`, `lr` and `weight_decay`, as torch's optimizers take them. args: all settings of the run. The
schedule sets each group's `lr` before every step; checkpoints hold the optimizer's state_dict.
"""

import torch

from swiftlite import register_optimizer


def momentum(groups, args):
    return torch.optim.SGD(groups, lr=args.lr, momentum=args.adam_beta1, nesterov=True)


register_optimizer("momentum", momentum)
