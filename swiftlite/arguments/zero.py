"""What DeepSpeed's stages and other tools' files of FSDP come to here: words of --fsdp."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from swiftlite.utils.errors import UsageError
from swiftlite.utils.text import one_line

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
            raise UsageError(f"--deepspeed {given}: is no configuration of DeepSpeed's ({one_line(error)})") from None
    if name not in ZERO:
        raise UsageError(f"--deepspeed {given}: must be one of {', '.join(ZERO)}, or a JSON file of such a stage")
    return list(ZERO[name])


# How a file of accelerate's or transformers' says what is divided -> the word of --fsdp.
_STRATEGIES = {
    "1": "full_shard", "full_shard": "full_shard", "2": "shard_grad_op", "shard_grad_op": "shard_grad_op", "3": "none",
    "no_shard": "none", "true": "full_shard", "false": "shard_grad_op",
}  # fmt: skip
_ON = (True, "true", "True")


@dataclass(frozen=True)
class Division:
    """words: of --fsdp. recomputes, offloads: are activations to be computed again, or moved to the host?"""

    words: list[str]
    recomputes: bool = False
    offloads: bool = False


def divided(fsdp: Sequence[str], fsdp_config: str | None, deepspeed: str | None) -> Division:
    """What the three flags come to. words: [], or full_shard or shard_grad_op, and perhaps offload. Raises: UsageError."""
    files = [(item, "fsdp") for item in fsdp if item.endswith(".json")]
    words = [word for item in fsdp if not item.endswith(".json") for word in item.replace(",", " ").split()]
    found: list[Division] = []
    if not words or set(words) - {"none", "false"}:  # else it is off
        files += [(fsdp_config, "fsdp_config")] if fsdp_config else []
        found = [fsdp_file(*file) for file in files]
        words += [word for part in found for word in part.words]
    if deepspeed not in (None, "none"):
        as_staged = zero_words(str(deepspeed))
        if words and words != as_staged:
            raise UsageError(f"--deepspeed {deepspeed} with --fsdp: both divide the model; leave out one")
        words = as_staged
    known = ("full_shard", "shard_grad_op", "fsdp2", "fsdp2_offload", "auto_wrap", "offload", "none", "false")
    unknown = next((word for word in words if word not in known), None)
    if unknown:
        raise UsageError(f"--fsdp {unknown}: must be full_shard or shard_grad_op, and offload after it")
    said = set(words)
    kind = ["shard_grad_op" if "shard_grad_op" in said else "full_shard"] if said - {"none", "false"} else []
    offload = ["offload"] if kind and said & {"offload", "fsdp2_offload"} else []
    return Division([*kind, *offload], any(part.recomputes for part in found), any(part.offloads for part in found))


def fsdp_file(given: str, flag: str) -> Division:
    """Read a JSON file of FSDP: ms-swift's {"fsdp": ..., "fsdp_config": {...}}, accelerate's, or what --fsdp_config takes.

    Its other settings say how weights are loaded, wrapped and saved, which changes no result. given: also JSON itself.
    Raises: UsageError for what is no such file, or divides in a way that there is none of here.
    """
    try:
        whole = _mapping(json.loads(given) if given.startswith("{") else _read(given))
        inner = _mapping(whole.get("fsdp_config", whole))
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(f"--{flag} {given}: is no configuration of FSDP ({one_line(error)})") from None
    settings = {name.removeprefix("fsdp_"): value for name, value in inner.items()}
    known = ("sharding_strategy", "reshard_after_forward", "offload_params", "activation_checkpointing", "version")
    if not {"fsdp", "fsdp_config"} & set(whole) and not set(known) & set(settings):
        raise UsageError(f"--{flag} {given}: is no configuration of FSDP; it has none of {', '.join(known)}")
    said = whole.get("fsdp")
    words = said.split() if isinstance(said, str) else [str(w) for w in said] if isinstance(said, list) else []
    for name in ("sharding_strategy", "reshard_after_forward"):
        if settings.get(name) is not None:
            value = str(settings[name]).lower()
            if value not in _STRATEGIES:
                raise UsageError(f"--{flag} {given}: {name} {settings[name]}: must be full_shard or shard_grad_op")
            words.append(_STRATEGIES[value])
    if settings.get("offload_params") in _ON:
        words.append("offload")
    recomputes, offloads = (settings.get(f"activation_{name}") in _ON for name in ("checkpointing", "cpu_offload"))
    return Division(words or ["full_shard"], recomputes, offloads)


def _read(path: str) -> object:
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def _mapping(value: object) -> Mapping[str, object]:
    if not isinstance(value, Mapping):
        raise TypeError("must be an object with settings")
    return value
