"""One step's gradients of transformers' model and of ours, held against each other."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file

from swiftlite.arguments.megatron_export import conversion_arguments
from swiftlite.checkpoint.bind import bind_map, convert_hf_config
from swiftlite.checkpoint.checkpoint import Checkpoint
from swiftlite.checkpoint.info import read_config
from swiftlite.families.hf_config import classes_of
from swiftlite.llm.model.corrections import correct
from swiftlite.llm.model.loader import auto_class
from swiftlite.megatron import hf_io
from swiftlite.megatron.distributed import parallel_groups
from swiftlite.megatron.model.provider import build_models
from swiftlite.selftest.precision_hf import hf_config
from swiftlite.selftest.precision_input import num_tokens
from swiftlite.utils.errors import VerifyError
from swiftlite.weights.storage import Files, read_tensor


def gradient_error(hf_dir: Path, trust_remote_code: bool = False) -> float:
    """Gradients of one masked cross-entropy step, Megatron's under Hugging Face names through the weight map.

    A classifier's is on the scores of every token, next to one that is always 0.
    Returns: the largest |g - g'| / max(|g'|, 1e-6 |all g'|) over tensors, in norms, fp32, g' being Hugging Face's.
    Raises: VerifyError if an expert that no token reached has a gradient on one side only.
    """
    config = read_config(hf_dir)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, config["vocab_size"], (2, num_tokens(config, 160)), generator=generator)
    pad = hf_config(hf_dir, trust_remote_code).pad_token_id  # Hugging Face's embedding gives the pad token no gradient
    ids[ids == (-1 if pad is None else pad)] = 5 if pad != 5 else 6
    labels = ids.roll(-1, 1).masked_fill(torch.rand(ids.shape, generator=generator) < 0.3, -100)
    labels[:, -1] = -100
    num_labels = classes_of(config)
    if num_labels is not None:
        labels = torch.where(labels < 0, labels, labels % (num_labels + 1))

    def step(model: torch.nn.Module, logits: torch.Tensor) -> None:
        if num_labels is not None:
            logits = torch.nn.functional.pad(logits, (0, 1))
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100).backward()
        for parameter in model.parameters():  # so that saving the model saves its gradients
            parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad

    with tempfile.TemporaryDirectory() as folder:
        theirs, mine = Path(folder) / "hf", Path(folder) / "mcore"
        loaded = hf_config(hf_dir, trust_remote_code)
        model = auto_class(config).from_pretrained(
            hf_dir, config=loaded, dtype=torch.float32, trust_remote_code=trust_remote_code
        )
        model = correct(model).train()
        if num_labels is not None:
            step(model, model.score(model.model(input_ids=ids, use_cache=False)[0]))
        else:
            step(model, model(input_ids=ids, use_cache=False).logits)
        model.save_pretrained(theirs)
        args = conversion_arguments(convert_hf_config(config), str(hf_dir), "float32")
        with parallel_groups(args):
            models = build_models(args)
            hf_io.load_weights(models, hf_dir)
            step(models[0].train(), models[0](ids, torch.arange(ids.shape[1]).expand_as(ids), None))
            hf_io.save_hf_weights(models, mine, hf_dir)
        expected, saved = load_file(theirs / "model.safetensors"), Checkpoint.open(mine).stored
        with Files() as files:
            found = {name: read_tensor(saved, name, files) for name in expected}
    everything = math.sqrt(sum(float(g.double().square().sum()) for g in expected.values()))
    worst = 0.0
    # Moved by the router and not by gradients, or not at all.
    others = {n for e in bind_map(config).entries if e.rule.is_buffer or e.rule.carried for n in e.hf}
    for name, reference in expected.items():
        if name in others:
            continue
        norm = float(reference.norm())
        if (norm == 0) != (float(found[name].norm()) == 0):
            raise VerifyError(f"{name} has a gradient on one side only")
        worst = max(worst, float((found[name] - reference).norm()) / max(norm, 1e-6 * everything))
    return worst
