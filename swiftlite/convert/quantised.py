"""`export --to_hf true --fp8 block|channel|tensor`: a checkpoint seen with its matrices in FP8, and the check of the result.

block: DeepSeek's form, 128 x 128 numbers share a scale, as vLLM and transformers read it. channel, tensor: those of
compressed-tensors. Embeddings, output layer, norms, routers and other parts than the text model stay as they are, as in
the releases of the families; where the source was FP8, whatever it kept plain.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch

from swiftlite.checkpoint.checkpoint import Checkpoint
from swiftlite.checkpoint.info import read_config
from swiftlite.utils.dist import barrier, get_rank, get_world_size
from swiftlite.utils.errors import ConfigError, VerifyError
from swiftlite.utils.logger import get_logger
from swiftlite.utils.types import Config, Json
from swiftlite.weights.fp8 import BLOCK, Fp8Source, Scales, open_source
from swiftlite.weights.quantise import CHUNK, Quantised, scale_name
from swiftlite.weights.storage import Files, WeightSource, decoder
from swiftlite.weights.stream import workers_here

# Parts of names of matrices that releases keep plain: routers, gates of shared experts, what joins MTP blocks to a model,
# small projections of linear attention and of indexers.
_PLAIN = {
    "embed_tokens", "lm_head", "head", "gate", "router", "shared_expert_gate", "eh_proj", "input_proj", "weights_proj",
    "in_proj_a", "in_proj_b", "in_proj_ba",
}  # fmt: skip


def quantised(source: Checkpoint, form: str) -> Checkpoint:
    """The same with its matrices in FP8 and the scales of these, as a Hugging Face directory holds them; single experts.

    Raises: ConfigError where no loader reads the result.
    """
    bound, kept = source.bound, source.scales
    if any(len(tensor.shape) == 2 for tensor in bound.fused.values()):
        raise ConfigError(f"--fp8 {form}: experts with biases are read by no loader of FP8; export without it")
    held = {part: name for name in source.names for part in bound.parts(name)}
    weights = [n for n in held if n not in source.copies and (n in kept.of if kept else _is_quantised(source, n))]
    if not weights:
        raise ConfigError(f"--fp8 {form}: the model has no matrices in layers, so there is nothing to quantise")
    fp8 = Quantised(source.source, weights, form, kept)
    scales = {name: scale_name(name, form) for name in weights}
    names = [n for name in held for n in ((name, scales[name]) if name in scales else (name,))]
    return replace(
        source, source=fp8, names=names, bound=replace(bound, fused={}),
        dtypes={n: fp8.spec(n).dtype if n in fp8.own else source.dtypes[held[n]] for n in names},
        files={n: source.files[held[fp8.scaled.get(n, n)]] for n in names} if source.files else {},
        carried=frozenset({*source.carried, *fp8.own}), scales=None,
        changes={**source.changes, "quantization_config": _config(source, form, names, weights)},
    )  # fmt: skip


def _is_quantised(source: Checkpoint, name: str) -> bool:
    words = name.split(".")
    return (
        words[-1] == "weight"
        and any(word.isdigit() for word in words)  # in a layer
        and len(source.source.spec(name).shape) == 2
        and name not in source.carried
        and not _PLAIN & set(words)
        and "norm" not in words[-2]
    )


def _config(source: Checkpoint, form: str, names: Iterable[str], weights: Iterable[str]) -> Config:
    """quantization_config; that of the source where it says the same."""
    if source.scales is not None and _says(source.scales, form):
        return source.scales.quantisation
    modules = [name.removesuffix(".weight") for name in weights]
    holders = {
        part for name in modules for part in _prefixes(name)
    }  # what a loader takes for a name of all that it holds
    head = source.bound.own_name("lm_head.weight")
    named = dict.fromkeys(name.removesuffix(".weight") for name in (head, *names) if name.endswith(".weight"))
    plain = [module for module in named if module not in holders]
    if form == "block":
        return {
            "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": list(BLOCK),
            "modules_to_not_convert": plain,
        }  # fmt: skip
    numbers: Json = {"num_bits": 8, "type": "float", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**numbers, "strategy": form, "dynamic": False},
        "input_activations": {**numbers, "strategy": "token", "dynamic": True},
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors", "format": "float-quantized", "quantization_status": "compressed",
        "config_groups": {"group_0": group}, "ignore": plain, "kv_cache_scheme": None,
    }  # fmt: skip


def _prefixes(module: str) -> list[str]:
    parts = module.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts) + 1)]


def _says(scales: Scales, form: str) -> bool:
    """Whether the source's quantization_config describes weights in this form, with activations scaled as they come."""
    written = scales.quantisation
    if form == "block":
        return (
            written.get("quant_method") == "fp8"
            and scales.block == BLOCK
            and written.get("activation_scheme") != "static"
        )
    groups = (written.get("config_groups") or {}).values()
    return bool(groups) and all(
        (group.get("weights") or {}).get("strategy") == form
        and (group.get("input_activations") or {"dynamic": True}).get("dynamic") is True
        for group in groups
    )


def check_rounding(source: WeightSource, directory: Path) -> None:
    """Read FP8 weights back and hold each number against what it was made of, which may be half a step away. Collective.

    Raises: VerifyError naming the first tensor with a number that is further off.
    """
    written = open_source(directory, read_config(directory))
    assert isinstance(written, Fp8Source)
    names = sorted(written.scales)[get_rank() :: get_world_size()]
    with Files() as files, ThreadPoolExecutor(workers_here()) as pool:
        for name, off in zip(names, pool.map(lambda n: _off(source, written, n, files), names), strict=True):
            if off > 1 + 1e-4:
                raise VerifyError(f"{name}: a number is {off:.3g} half steps of FP8 away from what it was made of")
    barrier()
    get_logger().info("verified: %d FP8 weights are within half a step of their sources", len(written.scales))


def _off(source: WeightSource, written: Fp8Source, name: str, files: Files) -> float:
    """The largest distance between a weight and its source, in half steps of FP8 where it is."""
    rows, wide = written.spec(name).shape
    step, worst = max(CHUNK // max(wide, 1), 1), 0.0
    decodes, original = decoder(written), decoder(source)
    assert decodes is not None
    for row in range(0, rows, step):
        count = (min(step, rows - row), wide)
        raw, stored = (torch.empty(count, dtype=origin.spec(name).dtype) for origin in (written, source))
        for origin, out in ((written, raw), (source, stored)):
            origin.read(name, row * wide, out.view(-1), files)
        values = stored.float() if original is None else original(name, row * wide, stored).view(count).float()
        scale = decodes(name, row * wide, torch.ones_like(raw)).view(count)
        # Numbers are 2 ** exponent times 0.5 to 1; below 2 ** -6 they are equally far apart.
        exponent = torch.frexp(raw.float().abs().clamp_min(2.0**-6))[1]
        half = torch.ldexp(scale, exponent - 5)
        distance = (decodes(name, row * wide, raw).view(count) - values).abs()
        worst = max(worst, float((distance / half).nan_to_num(nan=torch.inf).max()) if raw.numel() else 0.0)
    return worst
