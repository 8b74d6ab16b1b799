"""Adapters of peft besides plain LoRA: other beginnings, other kinds."""

from __future__ import annotations

import copy
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from swiftlite.arguments.base import PEFT_TUNERS
from swiftlite.arguments.train import SftArguments
from swiftlite.checkpoint.resolve import resolve
from swiftlite.cli.main import main
from swiftlite.llm.model import tuner
from swiftlite.llm.model.adapters import hold_beginnings
from swiftlite.train.plot import read_run
from swiftlite.train.schedule import Muon, build_optimizer
from swiftlite.utils.errors import UsageError
from tests.families.cases import build_hf, config_of

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def args(**values: Any) -> Any:
    return SftArguments(model="DIR", lora_dropout=0, lora_rank=4, lr=1e-2, **values)


def logits(model: Any) -> torch.Tensor:
    torch.manual_seed(1)
    return model(input_ids=torch.randint(3, 300, (2, 12)), use_cache=False).logits


def trained(model: Any, optimizer: torch.optim.Optimizer, steps: int = 3) -> torch.Tensor:
    """Logits after steps towards small ones."""
    for _ in range(steps):
        logits(model).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return logits(model).detach()


@pytest.mark.parametrize("kind, rslora", [("pissa", False), ("olora", True)])
def test_a_beginning_with_the_weights_is_pefts(kind: str, rslora: bool, tmp_path: Path) -> None:
    """Steps equal those of peft, which changes W; what is saved is plain LoRA that fits the base, and is resumed."""
    base = build_hf(config_of("qwen3:default"), tmp_path / "a")
    before = logits(base).detach()
    settings = args(train_type="lora", init_weights=kind, use_rslora=rslora)
    ours = tuner.prepare_model(copy.deepcopy(base), settings)
    assert torch.allclose(logits(ours), before, atol=1e-5), "it begins as the model"
    config = peft.LoraConfig(r=4, lora_alpha=32, use_rslora=rslora, target_modules=TARGETS, init_lora_weights=kind)
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    optimizer = build_optimizer(ours, settings)
    hold_beginnings(ours, optimizer, 4)
    after = trained(ours, optimizer)
    torch.testing.assert_close(after, trained(theirs, build_optimizer(theirs, settings)), rtol=1e-3, atol=1e-4)
    assert (after - before).abs().max() > 0.1
    ours.save_pretrained(tmp_path / "adapter")
    again = tuner.attach_adapter(copy.deepcopy(base), tmp_path / "adapter")
    torch.testing.assert_close(logits(again), after, rtol=1e-5, atol=1e-5)
    stated = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert (stated["r"], stated["init_lora_weights"]) == (8, True)
    resumed = tuner.prepare_model(copy.deepcopy(base), settings)
    tuner.load_adapter(resumed, tmp_path / "adapter")
    second = build_optimizer(resumed, settings)
    hold_beginnings(resumed, second, 4)
    second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert trained(resumed, second).equal(trained(ours, optimizer))


def test_beginnings_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match="--init_weights lora-ga: must be true, gaussian, .*; other beginnings look at"
    ):
        args(train_type="lora", init_weights="lora-ga")
    with pytest.raises(UsageError, match="goes with plain LoRA; leave out --use_dora"):
        args(train_type="lora", init_weights="pissa", use_dora=True)
    wide = SftArguments(model="DIR", train_type="lora", init_weights="pissa", lora_rank=1000)
    with pytest.raises(UsageError, match="--lora_rank 1000: .* has [0-9]+ singular values; use a lower rank"):
        tuner.prepare_model(build_hf(config_of("qwen3:default"), tmp_path / "a"), wide)


def test_gaussian_begins_without_a_change(tmp_path: Path) -> None:
    base = build_hf(config_of("qwen3:default"), tmp_path / "a")
    before = logits(base)
    model = tuner.prepare_model(base, args(train_type="lora", init_weights="gaussian"))
    assert logits(model).equal(before)
    a = torch.cat([p.detach().flatten() for n, p in model.named_parameters() if ".lora_A." in n])
    assert a.std().item() == pytest.approx(1 / 4, rel=0.05), "peft's: 1 / rank, where the default is uniform"


@pytest.mark.parametrize("kind", ["dora", *PEFT_TUNERS])
def test_other_adapters_are_trained_saved_and_read(kind: str, tmp_path: Path) -> None:
    """As peft makes them with the same settings; saved and attached they answer the same."""
    asked: dict[str, Any] = {"boft": {"boft_block_size": 8}, "oft": {"oft_block_size": 8}, "bone": {"r": 8}}
    base = build_hf(config_of("qwen3:default"), tmp_path / "a")
    before = logits(base).detach()
    own = {"train_type": "lora", "use_dora": True} if kind == "dora" else {"train_type": kind}
    settings = args(**own, tuner_settings=asked.get(kind, {}))
    torch.manual_seed(0)
    model = tuner.prepare_model(copy.deepcopy(base), settings)
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert names and all("embed_tokens" not in name and "lm_head" not in name for name in names)
    after = trained(model, build_optimizer(model, settings))
    assert (after - before).abs().max() > 0.01
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    assert set(load_file(tmp_path / "adapter/adapter_model.safetensors"))
    again = tuner.attach_adapter(copy.deepcopy(base), tmp_path / "adapter")
    torch.testing.assert_close(logits(again), after, rtol=1e-4, atol=1e-4)


def test_a_trial_without_weights_finds_what_is_wrong(tiny_model: Any) -> None:
    for settings, message in (
        ({"train_type": "boft", "tuner_settings": {"block": 8}}, "has no such setting"),
        (
            {"train_type": "lora", "init_weights": "pissa", "target_modules": ["q_proj"], "lora_rank": 999},
            "use a lower rank",
        ),
        ({"train_type": "lora", "init_weights": "olora", "target_modules": ["q_proj"]}, None),
    ):
        made = resolve(SftArguments(model=str(tiny_model("qwen3")), model_type="qwen3", **settings))
        with pytest.raises(UsageError, match=message) if message else nullcontext():
            tuner.check_settings(made)


def test_settings_of_other_adapters(tmp_path: Path) -> None:
    base = build_hf(config_of("qwen3:default"), tmp_path / "a")
    for settings, message in (
        ({"block_size": 8}, "--tuner_settings block_size: BOFTConfig of peft has no such setting; did you mean"),
        ({"boft_block_size": 7}, "adapters cannot be added: .*"),
    ):
        with pytest.raises(UsageError, match=message):
            tuner.prepare_model(copy.deepcopy(base), args(train_type="boft", tuner_settings=settings))
    with pytest.raises(UsageError, match="--tuner_settings: needs --train_type boft"):
        args(train_type="lora", tuner_settings={"r": 8})


def test_muon_and_adamw_are_torchs(tmp_path: Path) -> None:
    """Matrices of layers by one, embedding, output layer and norms by the other; a state that was saved goes on."""
    config = config_of("qwen3:default")
    settings = SftArguments(model="DIR", optim="muon", lr=1e-2)
    ours, theirs = (build_hf(config, tmp_path / name) for name in "ab")
    theirs.load_state_dict(ours.state_dict())
    optimizer = build_optimizer(ours, settings)
    assert isinstance(optimizer, Muon) and len(optimizer.param_groups) == 3
    of_layers = {n for n, p in theirs.named_parameters() if p.dim() == 2 and ".layers." in n}
    named = dict(theirs.named_parameters())
    muon = torch.optim.Muon([named[n] for n in of_layers], lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    others = [p for n, p in named.items() if n not in of_layers]
    adam = torch.optim.AdamW(
        [{"params": [p for p in others if p.dim() == 2], "weight_decay": 0.1},
         {"params": [p for p in others if p.dim() < 2], "weight_decay": 0.0}],
        lr=1e-2, betas=(0.9, 0.95), eps=1e-8,
    )  # fmt: skip
    for _ in range(3):
        logits(ours).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        logits(theirs).square().mean().backward()
        for one in (muon, adam):
            one.step()
            one.zero_grad()
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-5, atol=1e-5)
    again = build_hf(config, tmp_path / "c")
    again.load_state_dict(ours.state_dict())
    second = build_optimizer(again, settings)
    second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    schedule = torch.optim.lr_scheduler.LambdaLR(second, lambda step: 0.5)
    assert {group["lr"] for part in second.parts for group in part.param_groups} == {0.005}, schedule
    for group in second.param_groups:
        group["lr"] = 1e-2
    assert trained(again, second).equal(trained(ours, optimizer))


def test_lora_plus_has_its_own_rate(tmp_path: Path) -> None:
    settings = args(train_type="lora", loraplus_lr_ratio=16)
    model = tuner.prepare_model(build_hf(config_of("qwen3:default"), tmp_path / "a"), settings)
    optimizer = build_optimizer(model, settings)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    found = {(n.split(".")[-3], rates[id(p)]) for n, p in model.named_parameters() if p.requires_grad}
    assert found == {("lora_A", 1e-2), ("lora_B", 0.16)}


KINDS = {
    "qwen3": ["--train_type", "boft", "--tuner_settings", '{"boft_block_size": 8}'],
    "glm4_moe": ["--train_type", "lora", "--use_dora", "true", "--target_modules", *TARGETS],
}


@pytest.mark.parametrize("family, words", KINDS.items())
def test_what_peft_merges_answers_the_same(
    family: str, words: list[str], tiny_model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Trained, resumed, asked and merged from the command line; the merged files are named as the base model's."""
    base = ["--model", str(tiny_model(family)), "--model_type", {"qwen3": "qwen3", "glm4_moe": "glm4_5"}[family]]
    data = tmp_path / "data.jsonl"
    messages = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Swifty."}]
    data.write_text("\n".join(json.dumps({"messages": messages}) for _ in range(4)))
    train = ["sft", *base, "--dataset", str(data), *words, "--train_iters", "4", "--save_steps", "2", "--lr", "0.05",
             "--global_batch_size", "2", "--torch_dtype", "float32", "--logging_steps", "1", "--output_dir"]  # fmt: skip
    assert main([*train, str(tmp_path / "whole")]) == 0
    named = ["--resume_from_checkpoint", str(tmp_path / "whole/checkpoint-2")]
    assert main([*train, str(tmp_path / "parts"), *named]) == 0
    whole, parts = (
        [line["loss"] for line in read_run(tmp_path / name / "logging.jsonl")] for name in ("whole", "parts")
    )
    assert whole[2:] == parts and whole[-1] < 0.9 * whole[0]
    adapters = [*base, "--adapters", str(tmp_path / "whole/checkpoint-4")]
    assert main(["export", *adapters, "--merge_lora", "true", "--output_dir", str(tmp_path / "merged")]) == 0
    before, after = (
        load_file(directory / "model.safetensors") for directory in (tiny_model(family), tmp_path / "merged")
    )
    assert {name: t.shape for name, t in before.items()} == {name: t.shape for name, t in after.items()}
    changed = {name.split(".")[-2] for name in before if not before[name].equal(after[name])}
    assert changed == set(TARGETS)
    ask = ["--prompt", "Who?", "--max_new_tokens", "8", "--temperature", "0", "--torch_dtype", "float32"]
    answers = []
    for model in (adapters, ["--model", str(tmp_path / "merged"), *base[2:]]):
        capsys.readouterr()
        assert main(["infer", *model, *ask]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1]
    base_model, merged = (
        AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        for directory in (base[1], tmp_path / "merged")
    )
    before_training = logits(base_model.eval()).detach()
    adapted = tuner.attach_adapter(base_model, tmp_path / "whole/checkpoint-4").eval()
    torch.testing.assert_close(logits(merged.eval()), logits(adapted), rtol=1e-4, atol=1e-4)
    assert (logits(adapted) - before_training).abs().max() > 0.1
    assert main(["export", *adapters, "--merge_lora", "true", "--to_mcore", "true"]) == 2
    assert "is no plain LoRA; merge it first, with --merge_lora true alone" in capsys.readouterr().err
