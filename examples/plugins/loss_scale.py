"""Loss weights: `--external_plugins examples/plugins/loss_scale.py --loss_scale default+numbers` counts digits twice.

{regular expression: [weight of what it matches]}; or {text: [its weight, weight of what follows up to the next text]}.
"""

from swiftlite import register_loss_scale

register_loss_scale("numbers", {r"\d+": [2.0]})
