"""LoRA on Transformer Engine's layers: norm and linear in one, a rank's experts in one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from swiftlite.checkpoint.checkpoint import Checkpoint
from swiftlite.llm.model import tuner
from swiftlite.megatron import hf_io
from swiftlite.megatron.distributed import parallel_groups
from swiftlite.megatron.model.provider import build_models
from swiftlite.megatron.tuners.lora import adapters_disabled, prepare_lora
from tests.families.cases import build_hf
from tests.gpu.test_te import IDS, arguments, config
from tests.megatron.test_lora import by_name, lora_args, peft_names, randomise, set_by_name

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]


def step(
    logits: torch.Tensor, gradients: Callable[[], dict[str, torch.Tensor]]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """(logits, gradients of the next tokens' cross entropy by name), both in fp32."""
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), IDS[:, 1:].cuda().flatten())
    loss.backward()
    return logits.detach().float(), {name: gradient.float() for name, gradient in gradients().items()}


@pytest.mark.parametrize(
    "case", ["qwen3:default", "glm4_5:default", "moonlight:default", "glm4_0414:default", "olmo2:default"]
)
def test_logits_and_gradients_are_pefts(case: str, tmp_path: Path) -> None:
    """bf16 may be at most twice as far from peft's fp32 as peft's own bf16 is."""
    args = lora_args()
    args.mcore_adapter = None
    peft = tuner.lora_model(build_hf(config(case), tmp_path / "hf", dtype=torch.bfloat16), args).cuda()
    randomise(peft)
    theirs = peft_names(peft)
    for parameter in theirs.values():
        parameter.data = parameter.data.to("cuda", torch.bfloat16)

    def take() -> dict[str, torch.Tensor]:
        gradients = {name: parameter.grad for name, parameter in theirs.items()}
        peft.zero_grad()
        return gradients

    half = step(peft(input_ids=IDS.cuda(), use_cache=False).logits, take)
    with torch.no_grad(), peft.disable_adapter():
        base = peft(input_ids=IDS.cuda(), use_cache=False).logits.float()
    exact = step(peft.float()(input_ids=IDS.cuda(), use_cache=False).logits, take)
    with parallel_groups(options := arguments(tmp_path / "hf", "bfloat16")):
        models = build_models(options)
        prepare_lora(models, Checkpoint.open(tmp_path / "hf"), args)
        model = models[0].cuda()
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16()
        hf_io.load_weights(models, tmp_path / "hf")
        assert set(by_name(model)) == set(theirs)
        set_by_name(model, theirs)
        positions = torch.arange(IDS.shape[1], device="cuda").expand_as(IDS)
        found = step(model(IDS.cuda(), positions, None), lambda: by_name(model, gradients=True))
        with torch.no_grad(), adapters_disabled(models):
            without = model(IDS.cuda(), positions, None).float()

    def distance(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a - b).norm() / b.norm())

    errors = distance(found[0], exact[0]), distance(half[0], exact[0])
    joined = [
        torch.cat([gradients[name].flatten() for name in sorted(theirs)]) for _, gradients in (found, half, exact)
    ]
    slopes = distance(joined[0], joined[2]), distance(joined[1], joined[2])
    print(f"{case}: logits {errors[0]:.2e} (peft bf16 {errors[1]:.2e}), gradients {slopes[0]:.2e} ({slopes[1]:.2e})")
    assert errors[0] <= 2 * errors[1] + 1e-3 and slopes[0] <= 2 * slopes[1] + 1e-3
    assert distance(without, base) <= 2 * errors[1] + 1e-3 < distance(found[0], base)
