"""`swiftlite rlhf` and `dpo`: what `--rlhf_type` names, with transformers."""

from __future__ import annotations

from collections.abc import Sequence

from swiftlite.arguments.preference import DpoArguments
from swiftlite.checkpoint.resolve import as_arguments
from swiftlite.utils.types import Json


def rlhf_main(args: DpoArguments | Sequence[str]) -> Json:
    """As the function of its kind."""
    from swiftlite.llm.train.dpo import dpo_main
    from swiftlite.llm.train.gkd import gkd_main
    from swiftlite.llm.train.kto import kto_main
    from swiftlite.llm.train.reward import reward_main

    args = as_arguments(DpoArguments, args)
    return {"kto": kto_main, "gkd": gkd_main, "rm": reward_main}.get(args.rlhf_type, dpo_main)(args)
