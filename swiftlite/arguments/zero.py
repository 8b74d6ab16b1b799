"""What DeepSpeed's stages come to here: words of --fsdp."""

from __future__ import annotations

import json

from swiftlite.utils.errors import UsageError

# Stages of DeepSpeed's ZeRO -> words of --fsdp.
ZERO = {
    "zero0": [], "zero1": ["shard_grad_op"], "zero2": ["shard_grad_op"], "zero2_offload": ["shard_grad_op", "offload"],
    "zero3": ["full_shard"], "zero3_offload": ["full_shard", "offload"],
}  # fmt: skip


def zero_words(given: str) -> list[str]:
    """Words of --fsdp that divide as `--deepspeed given` does, a stage's name or a JSON file. Raises: UsageError."""
    name = given
    if given.endswith(".json"):
        try:
            with open(given, encoding="utf-8") as file:
                zero = json.load(file).get("zero_optimization") or {}
            places = [(zero.get(part) or {}).get("device", "none") for part in ("offload_param", "offload_optimizer")]
            name = f"zero{int(zero.get('stage', 0))}" + ("_offload" if set(places) != {"none"} else "")
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise UsageError(f"--deepspeed {given}: is no configuration of DeepSpeed's ({error})") from None
    if name not in ZERO:
        raise UsageError(f"--deepspeed {given}: must be one of {', '.join(ZERO)}, or a JSON file of such a stage")
    return list(ZERO[name])
