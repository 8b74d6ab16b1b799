"""LoRA and frozen parameters on Megatron in one process, against peft and transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from safetensors.torch import load_file

from swiftlite.arguments.train import SftArguments
from swiftlite.checkpoint.checkpoint import Checkpoint
from swiftlite.llm.model import reference, tuner
from swiftlite.llm.train.sft import sft_main
from swiftlite.megatron.hf_io import load_weights
from swiftlite.megatron.trainers.sft import megatron_sft_main
from swiftlite.megatron.tuners import rows
from swiftlite.megatron.tuners.lora import (
    Adapters,
    Lora,
    adapters_disabled,
    live_linears,
    prepare_lora,
)
from swiftlite.megatron.tuners.lora_plan import plan_lora
from swiftlite.train.plot import read_run
from swiftlite.utils.errors import MapError, UsageError
from swiftlite.weights.lora import PEFT_PREFIX, A, B, initial_a
from swiftlite.weights.merged import EMBEDDING, TOKENS
from tests.families.cases import build_hf, config_of
from tests.megatron.test_hf_io import IDS, assert_close, live, logits

reference.register()
CASES = ["qwen3:default", "qwen2_5:default", "glm4_5:default", "qwen2_moe:default", "moonlight:default",
         "deepseek_r1:default", "glm4_0414:default", "olmo2:default", "phi3:default",
         "seed_oss:default", "glm4_moe_lite:by_types", "hy_v3:default", "phi4:mini", "smollm3:default",
         "ministral3:default", "granite:default", "hunyuan_v1_dense:default", "hunyuan_v1_moe:default", "olmoe:default",
         "gemma2:default", "gemma3_text:default", "olmo3:default", "exaone4:default", "gemma3:default",
         "bailing_moe:bias", "deepseek_v3_2:default"]  # fmt: skip


def lora_args(**values: Any) -> SftArguments:
    return SftArguments(
        model="DIR", **{"train_type": "lora", "lora_rank": 4, "lora_alpha": 8, "lora_dropout": 0, **values}
    )


@contextmanager
def adapted(directory: Path, args: Any) -> Iterator[Any]:
    """The Megatron model of a directory with adapters on it."""
    args.mcore_adapter = None
    with live(directory) as (models, _):
        prepare_lora(models, Checkpoint.open(directory), args)
        load_weights(models, directory)
        yield models[0]


def by_name(model: Any, gradients: bool = False) -> dict[str, Any]:
    """The live adapters by Hugging Face name: parameters, or copies of each expert's part of one. Or their gradients."""
    found, parameters = {}, dict(model.adapters.named_parameters())
    for name, shard in model.adapters.shards().items():
        value = parameters[name].grad if gradients else parameters[name]
        if isinstance(shard, ShardedTensorFactory):
            found.update({part.key: part.data for part in replace(shard, data=value).build()})
        else:
            found[shard.key] = value
    return found


def set_by_name(model: Any, values: Any) -> None:
    parameters = dict(model.adapters.named_parameters())
    for name, shard in model.adapters.shards().items():
        several = isinstance(shard, ShardedTensorFactory)
        new = shard.merge_fn([values[part.key] for part in shard.build()]) if several else values[shard.key]
        parameters[name].data.copy_(new)


def peft_names(model: Any) -> dict[str, torch.nn.Parameter]:
    return {
        name.removeprefix(PEFT_PREFIX).replace(".default.", "."): parameter
        for name, parameter in model.named_parameters() if ".lora_" in name
    }  # fmt: skip


def randomise(peft: Any) -> None:
    for number, parameter in enumerate(peft_names(peft).values()):
        generator = torch.Generator().manual_seed(number)
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_are_those_of_peft(case: str, tmp_path: Path) -> None:
    args = lora_args(use_rslora=case.startswith("glm"))
    peft = tuner.lora_model(build_hf(config_of(case), tmp_path / "hf"), args)
    with adapted(tmp_path / "hf", args) as model:
        bound = Checkpoint.open(tmp_path / "hf").bound
        theirs, mine = peft_names(peft), {bound.module_name(name): p for name, p in by_name(model).items()}
        assert set(theirs) == set(mine)
        for name, parameter in mine.items():
            assert torch.equal(parameter, theirs[name]), f"{name} begins differently"
            assert name.endswith(A) == bool(parameter.any())
        with torch.no_grad():
            base = peft(input_ids=IDS, use_cache=False).logits
            assert_close(logits(model, IDS), base)
        randomise(peft)
        for name, parameter in mine.items():
            parameter.data.copy_(theirs[name])
        wanted, found = peft(input_ids=IDS, use_cache=False).logits, logits(model, IDS)
        assert_close(found, wanted)
        assert (wanted - base).abs().max() > 0.03 * min(1, base.abs().max())
        target = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1))
        for out in (wanted, found):
            (out * target).mean().backward()
        # transformers 4 runs no expert that gets no token; its gradient is None then.
        wanted_gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in theirs.items()}
        total = torch.stack([gradient.norm() for gradient in wanted_gradients.values()]).norm()
        for name, parameter in mine.items():
            gradient = wanted_gradients[name]
            assert (parameter.grad - gradient).norm() <= 1e-4 * max(gradient.norm(), 1e-6 * total), name
        trained = {id(p) for p in model.parameters() if p.requires_grad}
        assert trained == {id(p) for p in mine.values()}
        with torch.no_grad(), adapters_disabled([model]):
            assert_close(logits(model, IDS), base)
        assert_close(logits(model, IDS), found)


@pytest.mark.parametrize("targets", [["all-linear"], ["up_proj", "down_proj"]])
@pytest.mark.parametrize("linear", ["linear_fc1", "linear_fc2"])
def test_experts_at_once_equal_one_after_the_other(linear: str, targets: list[str], tmp_path: Path) -> None:
    """Some experts without rows, one without adapters, one of another rank and scale; ranks do not fill 16 bytes."""
    build_hf(config_of("glm4_5:default"), tmp_path / "hf")
    generator, args = torch.Generator().manual_seed(0), lora_args(target_modules=targets)
    bound = Checkpoint.open(tmp_path / "hf").bound
    with live(tmp_path / "hf") as (models, _):
        plan, path = plan_lora(bound, args), "decoder.layers.1.mlp.experts.local_experts."
        found = [one for one in live_linears(models[0], bound) if one.path.startswith(path) and linear in one.path]
        values: dict[str, Any] = {}
        for module, (rank, scale) in plan.modules.items():
            rank, scale = (3, 0.7) if ".experts.2." in module else (rank, scale)
            out, into = bound.by_hf[f"{module}.weight"][0].hf_shapes[bound.by_hf[f"{module}.weight"][1]]
            a, b = torch.randn(rank, into, generator=generator), torch.randn(out, rank, generator=generator)
            if ".experts.1." not in module:
                values[module] = ((rank, scale), (a, b))
        plan = replace(plan, modules={m: v[0] for m, v in values.items()}, values=lambda module: values[module][1])
        single = [None if one.expert == 1 else Lora([one], plan, 0, models[0].config) for one in found]
        experts = [replace(one, group=number) for number, one in enumerate(found)]
        grouped = Lora(experts, plan, 0, models[0].config)
    counts = [3, 2, 0, 7, *[1] * (len(single) - 4)]
    width = next(grouped.parameters()).shape[-1]
    x = torch.randn(sum(counts), width, generator=generator, requires_grad=True)
    out = next(lora(x[:1]).shape[-1] for lora in single if lora)
    one_by_one = torch.cat([
        lora(rows) if lora else torch.zeros(len(rows), out) for lora, rows in zip(single, x.split(counts), strict=True)
    ])  # fmt: skip
    at_once = grouped(x, torch.tensor(counts).cumsum(0, dtype=torch.int32))
    assert one_by_one.abs().max() > 1
    torch.testing.assert_close(at_once, one_by_one, rtol=1e-5, atol=1e-4)
    slope = torch.randn(at_once.shape, generator=generator)
    wanted, mine = (
        torch.autograd.grad(one_by_one, x, slope, retain_graph=True),
        torch.autograd.grad(at_once, x, slope, retain_graph=True),
    )
    torch.testing.assert_close(mine, wanted, rtol=1e-5, atol=1e-3)
    for y in (one_by_one, at_once):
        y.backward(slope)
    gradients = {}
    for lora in (lora for lora in single if lora):
        for name, shard in lora.shards().items():
            parameter = lora.get_parameter(name)
            gradients[shard.key] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    for name, factory in grouped.shards().items():
        gradient = grouped.get_parameter(name).grad
        parts = {part.key: part.data for part in replace(factory, data=gradient).build()}
        for key, part in parts.items():
            torch.testing.assert_close(part, gradients.pop(key), rtol=1e-5, atol=1e-3)
        filled = factory.merge_fn(list(parts.values()))
        assert torch.equal(filled, gradient)  # what ranks are filled up with has no gradient
    assert not gradients


# ---- whole runs ----

ROWS = [
    {"messages": [{"role": "user", "content": f"What is {i} plus {i}?"},
                  {"role": "assistant", "content": f"It is {2 * i}. " + "Paris is nice. " * (i % 3)}]}
    for i in range(8)
]  # fmt: skip
TYPES = {"qwen3": "qwen3", "glm4_moe": "glm4_5"}
STEPS = 20


def base_of(tiny_model: Callable[..., Path], family: str) -> Path:
    return tiny_model(family, vocab_size=333)


@pytest.fixture
def train(tiny_model: Callable[..., Path], tmp_path: Path) -> Callable[..., list[dict[str, float]]]:
    """train(main, output, family, **flags) -> log lines of the steps; the same 8 samples at every step."""
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))

    def run(main: Any, output: str, family: str = "qwen3", **flags: Any) -> list[dict[str, float]]:
        settings = {
            "model": base_of(tiny_model, family), "model_type": TYPES[family], "dataset": data,
            "output_dir": tmp_path / output, "torch_dtype": "float32", "micro_batch_size": 2, "global_batch_size": 8,
            "train_iters": STEPS, "lr": 3e-3, "lr_decay_style": "constant", "logging_steps": 1, "save_steps": 10,
            "adam_eps": 1e-5, "train_type": "lora", "lora_dropout": 0, "report_to": "none", **flags,
        }  # fmt: skip
        words = [word for name, value in settings.items() for word in (f"--{name}", *map(str, _listed(value)))]
        main(words)
        return [line for line in read_run(tmp_path / output / "logging.jsonl") if "loss" in line]

    return run


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def off(one: list[dict[str, float]], two: list[dict[str, float]], name: str = "loss") -> float:
    assert len(one) == len(two)
    return max(abs(a[name] - b[name]) / abs(a[name]) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize(
    ("family", "targets"),
    [("qwen3", ["all-linear"]), ("glm4_moe", ["all-linear"]), ("qwen3", ["q_proj", "v_proj", "up_proj"])],
)
def test_training_equals_peft(family: str, targets: list[str], train: Any, tmp_path: Path) -> None:
    settings = {"target_modules": targets, "lr": 2e-3}  # above, rounding grows over the last steps
    theirs = train(sft_main, "hf", family, **settings)
    mine = train(megatron_sft_main, "mcore", family, **settings)
    assert len(mine) == STEPS and mine[-1]["loss"] < 0.75 * mine[0]["loss"]
    assert off(theirs, mine) <= 1e-5
    assert off(theirs, mine, "grad_norm") <= 1e-5
    one, two = (
        load_file(tmp_path / d / "adapter_model.safetensors") for d in ("hf/checkpoint-20", "mcore/iter_0000020")
    )
    assert set(one) == set(two)
    for name, tensor in one.items():
        assert (two[name] - tensor).norm() <= 1e-3 * tensor.norm(), name


@pytest.mark.parametrize("family", TYPES)
def test_what_a_run_saves(family: str, train: Any, tiny_model: Any, tmp_path: Path) -> None:
    """Adapters only, resumable; PEFT next to them, which peft itself loads; the merged model is peft's."""
    from peft import PeftModel
    from torch.distributed.checkpoint import FileSystemReader
    from transformers import AutoModelForCausalLM

    # peft on transformers 5 overlooks adapters of dense MLPs once experts have some, so this one loads attention only.
    targets = ["all-linear"] if family == "qwen3" else ["q_proj", "k_proj", "v_proj", "o_proj"]
    train(megatron_sft_main, "run", family, train_iters=4, save_steps=2, merge_lora="true", target_modules=targets,
          use_rslora="true", save_total_limit=1)  # fmt: skip
    root, base = tmp_path / "run", base_of(tiny_model, family)
    assert sorted(p.name for p in root.glob("iter_*")) == ["iter_0000004", "iter_0000004-hf"]
    saved = root / "iter_0000004"
    keys = FileSystemReader(saved).read_metadata().state_dict_metadata
    adapters = {name for name in keys if name.startswith("model.")}
    states = {name for name in keys if name.startswith("optimizer.")}
    assert adapters and all(name.endswith((A, B)) for name in adapters | states)
    assert len(states) == 3 * len(adapters)
    assert {f"base_model.model.{name}" for name in adapters} == set(load_file(saved / "adapter_model.safetensors"))

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        plain = model(IDS, use_cache=False).logits
        peft = PeftModel.from_pretrained(model, saved).eval()
        wanted = peft(input_ids=IDS, use_cache=False).logits
        assert (wanted - plain).abs().max() > 0.01
        merged = AutoModelForCausalLM.from_pretrained(root / "iter_0000004-hf", dtype=torch.float32)
        assert_close(merged(IDS, use_cache=False).logits, wanted)
        unloaded = peft.merge_and_unload().state_dict()
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor, unloaded[name], rtol=1e-6, atol=1e-6)


def test_merged_experts_are_those_of_the_hugging_face_side(train: Any, tiny_model: Any, tmp_path: Path) -> None:
    """Where peft itself overlooks adapters, the Hugging Face side of swiftlite is the reference."""
    from transformers import AutoModelForCausalLM

    train(megatron_sft_main, "run", "glm4_moe", train_iters=2, merge_lora="true")
    root, base = tmp_path / "run", base_of(tiny_model, "glm4_moe")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        adapted = tuner.attach_adapter(model, root / "iter_0000002").eval()
        wanted = adapted(input_ids=IDS, use_cache=False).logits
        merged = AutoModelForCausalLM.from_pretrained(root / "iter_0000002-hf", dtype=torch.float32)
        assert_close(merged(IDS, use_cache=False).logits, wanted)


def test_a_stopped_run_goes_on(train: Any, tmp_path: Path) -> None:
    whole = train(megatron_sft_main, "whole", train_iters=8, save_steps=4, lora_dropout=0.1)
    train(megatron_sft_main, "cut", train_iters=8, save_steps=4, lora_dropout=0.1)
    (tmp_path / "cut/latest_checkpointed_iteration.txt").write_text("4")  # as if it had been killed in step 5
    again = train(megatron_sft_main, "cut", train_iters=8, save_steps=4, lora_dropout=0.1)
    assert [(line["loss"], line["grad_norm"]) for line in again] == [(x["loss"], x["grad_norm"]) for x in whole]
    with pytest.raises(UsageError, match="other settings .lora_rank 8 -> 4"):
        train(megatron_sft_main, "cut", train_iters=8, save_steps=4, lora_dropout=0.1, lora_rank=4)


def test_experts_in_one_layer_train_and_save_as_single_ones(train: Any, tmp_path: Path) -> None:
    """The same losses and the same files; a run of the one kind resumes as the other."""
    single = train(megatron_sft_main, "single", "glm4_moe", train_iters=6, save_steps=3)
    one = train(megatron_sft_main, "one", "glm4_moe", train_iters=6, save_steps=3, moe_grouped_impl="torch")
    assert off(single, one) <= 1e-5 and off(single, one, "grad_norm") <= 1e-5
    wanted, found = (load_file(tmp_path / d / "iter_0000006/adapter_model.safetensors") for d in ("single", "one"))
    assert set(wanted) == set(found)
    for name, tensor in wanted.items():
        assert (found[name] - tensor).norm() <= 1e-3 * tensor.norm(), name
    (tmp_path / "single/latest_checkpointed_iteration.txt").write_text("3")  # as if it had been killed in step 4
    again = train(megatron_sft_main, "single", "glm4_moe", train_iters=6, save_steps=3, moe_grouped_impl="torch")
    assert off(single, again) <= 1e-5


@pytest.mark.parametrize("source", ["hf", "mcore"])
def test_training_goes_on_from_an_adapter(source: str, train: Any, tmp_path: Path) -> None:
    """Of either format, with its own rank and scale; both sides take the same steps from it."""
    options = {"lora_rank": 4, "lora_alpha": 12, "use_rslora": "true"}
    train(megatron_sft_main, "first", train_iters=3, **options)
    first = tmp_path / "first" if source == "mcore" else tmp_path / "first/iter_0000003"
    flag = {"mcore_adapter" if source == "mcore" else "adapters": first}
    theirs = train(sft_main, "hf", train_iters=4, adapters=tmp_path / "first/iter_0000003")
    mine = train(megatron_sft_main, "mcore", train_iters=4, **flag)
    assert off(theirs, mine) <= 1e-5
    config = json.loads((tmp_path / "mcore/iter_0000004/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (4, 12, True)


def test_half_precision_learns_as_fp32_does(train: Any) -> None:
    """The optimizer holds adapters in fp32: small steps are not lost."""
    whole = train(megatron_sft_main, "fp32", "glm4_moe", train_iters=10)
    half = train(megatron_sft_main, "bf16", "glm4_moe", train_iters=10, torch_dtype="bfloat16")
    assert whole[-1]["loss"] < 0.8 * whole[0]["loss"]
    assert off(whole, half) <= 0.01


def test_recomputation_changes_nothing(train: Any) -> None:
    plain = train(megatron_sft_main, "plain", train_iters=3)
    full = train(megatron_sft_main, "full", train_iters=3, recompute="full")
    assert off(plain, full) <= 1e-6 and off(plain, full, "grad_norm") <= 1e-5


def test_dropout_acts_in_training_only(tmp_path: Path) -> None:
    build_hf(config_of("qwen3:default"), tmp_path / "hf")
    with adapted(tmp_path / "hf", lora_args(lora_dropout=0.5)) as model, torch.no_grad():
        for parameter in model.adapters.parameters():
            parameter.normal_(0, 0.1)
        one, two = (logits(model.train(), IDS) for _ in range(2))
        assert (one - two).abs().max() > 0.01
        one, two = (logits(model.eval(), IDS) for _ in range(2))
        assert torch.equal(one, two)


def test_targets(tmp_path: Path) -> None:
    build_hf(config_of("glm4_5:default"), tmp_path / "hf")
    bound = Checkpoint.open(tmp_path / "hf").bound

    def chosen(**values: Any) -> set[str]:
        return set(plan_lora(bound, lora_args(**values)).modules)

    everything = chosen()
    mtp = f"layers.{config_of('glm4_5:default')['num_hidden_layers']}."
    assert not any(name.endswith((".gate", "lm_head")) or mtp in name for name in everything)
    assert chosen(target_modules=["mlp.up_proj"]) == {"model.layers.0.mlp.up_proj"}
    assert chosen(target_modules=["q_proj"]) == {name for name in everything if name.endswith("q_proj")}
    assert chosen(target_regex=r".*\.1\..*shared_experts\..*") == {
        f"model.layers.1.mlp.shared_experts.{part}_proj" for part in ("gate", "up", "down")
    }
    with pytest.raises(UsageError, match="--target_modules lm_head: no such linear layer"):
        chosen(target_modules=["lm_head"])
    with pytest.raises(UsageError, match="--target_regex nothing: fits no linear layer"):
        chosen(target_regex="nothing")


def test_initial_values_are_those_of_peft_in_distribution() -> None:
    a = initial_a("model.layers.0.self_attn.q_proj", 64, 256, seed=1)
    assert a.abs().max() <= 1 / 16 and a.std().item() == pytest.approx(1 / 16 / 3**0.5, rel=0.02)
    assert torch.equal(a, initial_a("model.layers.0.self_attn.q_proj", 64, 256, seed=1))
    assert not torch.equal(a, initial_a("model.layers.0.self_attn.q_proj", 64, 256, seed=2))
    assert not torch.equal(a, initial_a("model.layers.1.self_attn.q_proj", 64, 256, seed=1))


# ---- rows of new tokens ----


@pytest.mark.parametrize(("family", "tied"), [("qwen3", True), ("qwen3", False), ("glm4_moe", False)])
def test_rows_of_new_tokens_train_as_with_peft(
    family: str, tied: bool, train: Any, tiny_model: Any, tmp_path: Path
) -> None:
    """With and without room in the vocabulary; the adapter resumes on either side, and a stopped run where it was."""
    base = tiny_model(family, vocab_size=300 if tied else 333, tie_word_embeddings=tied)
    flags = {"model": base, "train_iters": 8, "save_steps": 4, "lr": 2e-3}
    new = {**flags, "new_special_tokens": ["Paris", "nice", "What"]}
    theirs = train(sft_main, "hf", family, **new)
    mine = train(megatron_sft_main, "mcore", family, **new)
    assert off(theirs, mine) <= 1e-5 and off(theirs, mine, "grad_norm") <= 1e-5
    last = tmp_path / "mcore/iter_0000008"
    one, two = (load_file(d / "adapter_model.safetensors") for d in (tmp_path / "hf/checkpoint-8", last))
    assert set(one) == set(two)
    for name, tensor in one.items():
        assert (two[name] - tensor).norm() <= 1e-3 * tensor.norm(), name
    trained = [tensor for name, tensor in two.items() if name.endswith(TOKENS)]
    assert len(trained) == (1 if tied else 2) and all(len(tensor) == 3 for tensor in trained)
    assert all((tensor[0] - tensor[1]).norm() > 1e-3 for tensor in trained), "each has its own values"
    stated = [json.loads((d / "adapter_config.json").read_text()) for d in (tmp_path / "hf/checkpoint-8", last)]
    assert stated[0]["trainable_token_indices"] == stated[1]["trainable_token_indices"]

    further = {**flags, "train_iters": 2}
    theirs = train(sft_main, "hf-further", family, **further, adapters=[last])
    mine = train(megatron_sft_main, "mcore-further", family, **further, mcore_adapter=tmp_path / "mcore")
    assert off(theirs, mine) <= 1e-5 and off(theirs, mine, "grad_norm") <= 1e-5
    if tied:
        before = read_run(tmp_path / "mcore/logging.jsonl")
        shutil.rmtree(last)
        (tmp_path / "mcore/latest_checkpointed_iteration.txt").write_text("4")
        train(megatron_sft_main, "mcore", family, **new)
        assert [line["loss"] for line in read_run(tmp_path / "mcore/logging.jsonl")] == pytest.approx(
            [line["loss"] for line in before], rel=1e-6
        )


@pytest.mark.parametrize(("tied", "mtp", "refused"), [(True, None, True), (False, 1, True), (False, None, False)])
def test_rows_of_one_matrix_on_two_stages_are_refused(
    tied: bool, mtp: int | None, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "mpu", SimpleNamespace(get_pipeline_model_parallel_world_size=lambda: 2))
    model = SimpleNamespace(
        config=SimpleNamespace(mtp_num_layers=mtp), share_embeddings_and_output_weights=tied, post_process=False
    )
    with pytest.raises(UsageError, match="--pipeline_model_parallel_size 1") if refused else nullcontext():
        rows.add_rows(model, Adapters(), {EMBEDDING: ([3], torch.zeros(1, 4))})
    rows.add_rows(model, Adapters(), {})


# ---- freeze ----


@pytest.mark.parametrize("family", TYPES)
def test_frozen_parameters_stay_and_the_others_train_as_with_transformers(
    family: str, train: Any, tiny_model: Any, tmp_path: Path
) -> None:
    flags = {"train_type": "freeze", "freeze_parameters": ["model.embed_tokens", "model.layers.0."], "lr": 1e-3,
             "train_iters": 6, "save_steps": 6}  # fmt: skip
    theirs = train(sft_main, "hf", family, **flags)
    mine = train(megatron_sft_main, "mcore", family, save_safetensors="true", **flags)
    assert off(theirs, mine) <= 1e-5 and off(theirs, mine, "grad_norm") <= 1e-4
    before = load_file(base_of(tiny_model, family) / "model.safetensors")
    after = load_file(tmp_path / "mcore/iter_0000006-hf/model.safetensors")
    frozen = {name for name in before if name.startswith(("model.embed_tokens", "model.layers.0."))}
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert frozen <= same and all(name.endswith("e_score_correction_bias") for name in same - frozen)
    from torch.distributed.checkpoint import FileSystemReader

    keys = FileSystemReader(tmp_path / "mcore/iter_0000006").read_metadata().state_dict_metadata
    assert "embedding.word_embeddings.weight" in keys
    assert "optimizer.state.exp_avg.embedding.word_embeddings.weight" not in keys
    assert "optimizer.state.exp_avg.output_layer.weight" in keys


def test_what_is_one_matrix_cannot_be_parted(train: Any) -> None:
    with pytest.raises(UsageError, match="q_proj.*would be trained and .*[kv]_proj.* not.*one matrix"):
        train(megatron_sft_main, "run", train_type="freeze", trainable_parameters_regex="q_proj")
    with pytest.raises(UsageError, match="--adapters, --mcore_adapter and --merge_lora: need --train_type lora"):
        train(megatron_sft_main, "run", train_type="full", merge_lora="true")


def test_adapters_on_other_layers_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    build_hf(config_of("qwen3:default"), tmp_path / "hf")
    directory = tmp_path / "adapter"
    directory.mkdir()
    (directory / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    width, vocab = config_of("qwen3:default")["hidden_size"], config_of("qwen3:default")["vocab_size"]
    save_file({"base_model.model.lm_head.lora_A.weight": torch.zeros(2, width),
               "base_model.model.lm_head.lora_B.weight": torch.zeros(vocab, 2)},
              directory / "adapter_model.safetensors")  # fmt: skip
    with pytest.raises(MapError, match="lm_head: adapters on such layers are not trained on Megatron"):
        with adapted(tmp_path / "hf", lora_args(adapters=[str(directory)])):
            pass


def test_experts_of_a_grouped_layer(tmp_path: Path) -> None:
    """Transformer Engine keeps a rank's experts in one layer: rows of x are sorted by expert, weights are numbered."""

    class Grouped(torch.nn.Module):
        def __init__(self, linears: list[torch.nn.Module]) -> None:
            super().__init__()
            for number, linear in enumerate(linears):
                self.register_parameter(f"weight{number}", linear.weight)

        def forward(self, x: torch.Tensor, splits: torch.Tensor) -> tuple[torch.Tensor, None]:
            parts = x.split(splits.tolist())
            return torch.cat([p @ getattr(self, f"weight{i}").T for i, p in enumerate(parts)]), None

    build_hf(config_of("glm4_5:default"), tmp_path / "hf")
    args = lora_args(target_regex=r".*mlp\.experts\.(?!2\.)\d+\.(gate|up|down)_proj")
    with adapted(tmp_path / "hf", args) as model:
        values = {name: 0.1 * torch.randn(value.shape) for name, value in by_name(model).items()}
        set_by_name(model, values)
        experts = [expert.linear_fc1 for expert in model.decoder.layers[1].mlp.experts.local_experts]
        splits = torch.tensor([3, 0, 4, 1, 2, 5, 1, 2])
        x = torch.randn(int(splits.sum()), experts[0].weight.shape[1])

        def one_by_one() -> torch.Tensor:
            return torch.cat([expert(part)[0] for expert, part in zip(experts, x.split(splits.tolist()), strict=True)])

        wanted, bound, grouped = one_by_one(), Checkpoint.open(tmp_path / "hf").bound, Grouped(experts)
        place = {id(parameter): number for number, parameter in enumerate(grouped.parameters())}
        linears = [
            replace(one, path="grouped", module=grouped, group=place[id(one.weight)])
            for one in live_linears(model, bound) if id(one.weight) in place
        ]  # fmt: skip
        plan = replace(plan_lora(bound, args), values=lambda module: (values[module + A], values[module + B]))
        adapters = Adapters()
        adapters.attach(linears[0], Lora(linears, plan, 0, model.config))
        assert_close(grouped(x, splits)[0], wanted)
        adapters.enabled = model.adapters.enabled = False
        base = one_by_one()
        assert_close(grouped(x, splits)[0], base)
        assert (base - wanted).abs().max() > 0.01
