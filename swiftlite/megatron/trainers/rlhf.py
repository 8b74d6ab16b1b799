"""`swiftlite megatron rlhf` and `dpo`: what `--rlhf_type` names, on megatron-core."""

from __future__ import annotations

from collections.abc import Sequence

from swiftlite.arguments.megatron_preference import MegatronDpoArguments
from swiftlite.checkpoint.resolve import as_arguments
from swiftlite.utils.types import Json


def megatron_rlhf_main(args: MegatronDpoArguments | Sequence[str]) -> Json:
    """As the function of its kind."""
    from swiftlite.megatron.trainers.dpo import megatron_dpo_main
    from swiftlite.megatron.trainers.gkd import megatron_gkd_main
    from swiftlite.megatron.trainers.kto import megatron_kto_main
    from swiftlite.megatron.trainers.reward import megatron_reward_main

    args = as_arguments(MegatronDpoArguments, args)
    others = {"kto": megatron_kto_main, "gkd": megatron_gkd_main, "rm": megatron_reward_main}
    return others.get(args.rlhf_type, megatron_dpo_main)(args)
