"""LoRA adapters: PEFT <-> Megatron bit for bit, merging equal to peft's own, adapters of other Megatron tools."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from swiftlite.checkpoint.bind import bind_map
from swiftlite.cli import export as cli_export
from swiftlite.cli.main import main
from swiftlite.weights.lora import ALL_LINEAR, LoraConfig
from tests.families.cases import build_hf, config_of

ROOT = Path(__file__).parents[2]
PACKED = re.compile(r"\.experts\.(base_layer\.)?lora_")
CASES = {"qwen3:default": "qwen3", "glm4_5:default": "glm4_5", "moonlight:default": "moonlight"}
# Files of the first have another name for a module than transformers; peft packs no experts of either.
NAMES = {**CASES, "hy_v3:default": "hy_v3", "bailing_moe:bias": "bailing_moe"}


def make_adapter(base: Path, directory: Path, case: str, **options: Any) -> Any:
    """A PEFT adapter with random A and B on everything that peft's `all-linear` list finds. Returns: the peft model.

    transformers 5 keeps the experts of a layer in one tensor, so peft packs their adapters; see add_expert_adapters.
    """
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    linear = {n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    targets = sorted(set(ALL_LINEAR) & linear)
    peft = get_peft_model(model, PeftConfig(r=4, lora_alpha=12, target_modules=targets, lora_dropout=0.0, **options))
    generator = torch.Generator().manual_seed(5)
    for name, parameter in peft.named_parameters():
        if "lora_" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    peft.save_pretrained(directory)
    return peft


def add_expert_adapters(directory: Path, case: str) -> None:
    """Put one pair per expert, as models with a module per expert have, in place of peft's packed ones."""
    path = directory / "adapter_config.json"
    config = {**json.loads(path.read_text()), "alpha_pattern": {}, "rank_pattern": {}, "target_parameters": None}
    tensors = load_file(directory / "adapter_model.safetensors")
    tensors = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    generator = torch.Generator().manual_seed(6)
    bound = bind_map(config_of(case))
    for name, (entry, position) in bound.by_hf.items():
        if ".experts." in name:
            out, into = entry.hf_shapes[position]
            module = "base_model.model." + name.removesuffix(".weight")
            tensors[f"{module}.lora_A.weight"] = 0.1 * torch.randn(4, into, generator=generator)
            tensors[f"{module}.lora_B.weight"] = 0.1 * torch.randn(out, 4, generator=generator)
    config["target_modules"] = sorted({n.split(".lora_")[0].rpartition(".")[2] for n in tensors})
    path.write_text(json.dumps(config))
    save_file(tensors, directory / "adapter_model.safetensors", {"format": "pt"})


def export(*words: str | Path) -> int:
    return main(["export", *map(str, words)])


@pytest.mark.parametrize("case", NAMES)
def test_peft_to_megatron_and_back_is_bit_exact(case: str, tmp_path: Path) -> None:
    build_hf(config_of(case), tmp_path / "hf")
    make_adapter(tmp_path / "hf", tmp_path / "peft", case)
    add_expert_adapters(tmp_path / "peft", case)
    base = ("--model", tmp_path / "hf", "--model_type", NAMES[case])
    assert export(*base, "--adapters", tmp_path / "peft", "--to_mcore", "true", "--output_dir", tmp_path / "m") == 0
    assert export(*base, "--mcore_adapter", tmp_path / "m", "--to_hf", "true", "--output_dir", tmp_path / "back") == 0
    original, back = (load_file(tmp_path / d / "adapter_model.safetensors") for d in ("peft", "back"))
    assert list(original) == list(back)
    assert all(torch.equal(original[n], back[n]) for n in original)
    assert (tmp_path / "peft/adapter_config.json").read_bytes() == (tmp_path / "back/adapter_config.json").read_bytes()


def logits_of(base: Path, adapter: Path | None = None) -> torch.Tensor:
    """[1, 24, V] of a model directory, with an adapter that peft itself loads."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        return model(torch.arange(1, 25)[None]).logits


@pytest.mark.parametrize(
    ("case", "packed"), [*product(CASES, [False, True]), ("hy_v3:default", True), ("bailing_moe:bias", False)]
)
def test_peft_loads_what_comes_back_from_megatron(case: str, packed: bool, tmp_path: Path) -> None:
    """The merged model, the adapter in peft and the adapter that went through Megatron in peft: the same logits."""
    hf, peft, back, merged = (tmp_path / d for d in ("hf", "peft", "back", "merged"))
    build_hf(config_of(case), hf)
    make_adapter(hf, peft, case)
    if not packed:
        add_expert_adapters(peft, case)
    base = ("--model", hf, "--model_type", NAMES[case])
    assert export(*base, "--adapters", peft, "--to_mcore", "true", "--output_dir", tmp_path / "m") == 0
    assert export(*base, "--mcore_adapter", tmp_path / "m", "--to_hf", "true", "--output_dir", back) == 0
    assert export(*base, "--mcore_adapter", tmp_path / "m", "--merge_lora", "true", "--output_dir", merged) == 0
    wanted = logits_of(hf, peft)
    assert (wanted - logits_of(hf)).abs().max() > 0.1
    torch.testing.assert_close(logits_of(merged), wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits_of(hf, back), wanted, rtol=1e-4, atol=1e-4)


def plain_merge(
    base: dict[str, torch.Tensor], adapter: dict[str, torch.Tensor], scale: float
) -> dict[str, torch.Tensor]:
    merged = dict(base)
    for name, a in adapter.items():
        if name.endswith(".lora_A.weight"):
            module = name.removesuffix(".lora_A.weight")
            weight = module.removeprefix("base_model.model.") + ".weight"
            merged[weight] = base[weight] + scale * adapter[f"{module}.lora_B.weight"] @ a
    return merged


@pytest.mark.parametrize("case", NAMES)
@pytest.mark.parametrize("rslora", [False, True])
def test_merged_model_equals_pefts_own_merge(case: str, rslora: bool, tmp_path: Path) -> None:
    build_hf(config_of(case), tmp_path / "hf")
    peft = make_adapter(tmp_path / "hf", tmp_path / "peft", case, use_rslora=rslora)
    base = ("--model", tmp_path / "hf", "--model_type", NAMES[case], "--merge_lora", "true")
    assert export(*base, "--adapters", tmp_path / "peft", "--output_dir", tmp_path / "merged") == 0
    peft.merge_and_unload().save_pretrained(tmp_path / "theirs")
    mine, theirs = (load_file(tmp_path / d / "model.safetensors") for d in ("merged", "theirs"))
    for name, tensor in theirs.items():  # transformers leaves MTP out
        torch.testing.assert_close(mine[name], tensor, rtol=1e-6, atol=1e-6)
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(tmp_path / "merged")


def test_patterns_of_rank_and_alpha_are_pefts(tmp_path: Path) -> None:
    """The first pattern that fits counts, and a module's own rank its scale."""
    build_hf(config_of("qwen3:default"), tmp_path / "hf")
    patterns = {
        "rank_pattern": {r"layers\.1\.self_attn\.q_proj": 2, "q_proj": 8, "down_proj": 3},
        "alpha_pattern": {r"layers\.1\..*": 5, "q_proj": 32, "up_proj": 7},
    }
    peft = make_adapter(tmp_path / "hf", tmp_path / "peft", "qwen3:default", **patterns)
    words = ("--model", tmp_path / "hf", "--model_type", "qwen3", "--merge_lora", "true", "--adapters")
    assert export(*words, tmp_path / "peft", "--output_dir", tmp_path / "merged") == 0
    peft.merge_and_unload().save_pretrained(tmp_path / "theirs")
    mine, theirs = (load_file(tmp_path / d / "model.safetensors") for d in ("merged", "theirs"))
    for name, tensor in theirs.items():
        torch.testing.assert_close(mine[name], tensor, rtol=1e-6, atol=1e-6)


def test_bf16_merge_is_rounded_once(tmp_path: Path) -> None:
    """The product and the sum are fp32 and rounded once; peft rounds B A to bf16 before the sum."""
    build_hf({**config_of("qwen3:default"), "torch_dtype": "bfloat16"}, tmp_path / "hf", dtype=torch.bfloat16)
    peft = make_adapter(tmp_path / "hf", tmp_path / "peft", "qwen3:default").to(torch.bfloat16)
    peft.save_pretrained(tmp_path / "peft")
    base, adapter = load_file(tmp_path / "hf/model.safetensors"), load_file(tmp_path / "peft/adapter_model.safetensors")
    exact = plain_merge(*({n: t.double() for n, t in d.items()} for d in (base, adapter)), 3.0)
    words = ("--model", tmp_path / "hf", "--model_type", "qwen3", "--merge_lora", "true", "--verify", "bitwise")
    assert export(*words, "--adapters", tmp_path / "peft", "--output_dir", tmp_path / "merged") == 0
    mine = load_file(tmp_path / "merged/model.safetensors")
    theirs = peft.merge_and_unload().state_dict()
    worse = 0
    for name, tensor in mine.items():
        assert tensor.dtype == torch.bfloat16
        error, their_error = ((t[name].double() - exact[name]).abs() for t in (mine, theirs))
        half_step = exact[name].abs() * 2**-8 + 2e-7  # of bf16, and what fp32 loses
        assert (error <= half_step).all(), name
        worse += int((their_error > error).sum())
    assert worse > 0
    words = (*words, "--to_mcore", "true", "--test_convert_precision", "true", "--adapters", tmp_path / "peft")
    assert export(*words, "--output_dir", tmp_path / "mcore") == 0


def test_an_adapter_that_is_converted_computes_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    build_hf(config_of("qwen3:default"), tmp_path / "hf")
    make_adapter(tmp_path / "hf", tmp_path / "peft", "qwen3:default")
    words = ("--model", tmp_path / "hf", "--model_type", "qwen3", "--test_convert_precision", "true")
    there = ("--adapters", tmp_path / "peft", "--to_mcore", "true", "--output_dir", tmp_path / "mcore")
    assert export(*words, *there) == 0
    back = ("--mcore_adapter", tmp_path / "mcore", "--to_hf", "true", "--output_dir")
    assert export(*words, *back, tmp_path / "back") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "hf", "mcore", "peft"]
    check = cli_export.check_adapter

    def damaged(args: Any, given: Path, written: Path) -> None:
        file = written / "adapter_model.safetensors"
        tensors = load_file(file)
        name = next(n for n in tensors if "layers.1.self_attn.v_proj.lora_B" in n)
        save_file({**tensors, name: 2 * tensors[name]}, file)
        check(args, given, written)

    monkeypatch.setattr(cli_export, "check_adapter", damaged)
    capsys.readouterr()
    assert export(*words, *back, tmp_path / "wrong") == 1
    assert "layer 1" in capsys.readouterr().err and not (tmp_path / "wrong").exists()


def test_dry_run_writes_nothing_and_whole_models_are_compared_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build_hf(config_of("qwen3:default"), tmp_path / "hf")
    make_adapter(tmp_path / "hf", tmp_path / "peft", "qwen3:default")
    words = ("--model", tmp_path / "hf", "--model_type", "qwen3", "--adapters", tmp_path / "peft")
    for what in ("--merge_lora", "--to_mcore", "--to_hf"):
        assert export(*words, what, "true", "--dry_run", "true", "--output_dir", tmp_path / "out") == 0
        assert not (tmp_path / "out").exists()
    assert export(*words, "--merge_lora", "true", "--test_convert_precision", "true") == 2
    assert "no other side" in capsys.readouterr().err
    assert export(*words, "--mcore_adapter", tmp_path / "x", "--merge_lora", "true") == 2
    assert "one adapter at a time" in capsys.readouterr().err


def test_a_killed_merge_does_not_go_on_with_another_adapter(tmp_path: Path) -> None:
    """The adapter belongs to what identifies a conversion."""
    from swiftlite.weights import stream

    build_hf(config_of("qwen3:default"), tmp_path / "hf")
    make_adapter(tmp_path / "hf", tmp_path / "one", "qwen3:default")
    make_adapter(tmp_path / "hf", tmp_path / "two", "qwen3:default")
    tensors = load_file(tmp_path / "two/adapter_model.safetensors")
    save_file({n: -t for n, t in tensors.items()}, tmp_path / "two/adapter_model.safetensors")
    words = ("--model", tmp_path / "hf", "--model_type", "qwen3", "--to_mcore", "true", "--merge_lora", "true")
    write, calls = stream.Files.write, []

    def failing(files: Any, *args: Any) -> None:
        calls.append(args)
        if len(calls) > 12:
            raise OSError("the disk is full")
        write(files, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream.Files, "write", failing)
        assert export(*words, "--adapters", tmp_path / "one", "--output_dir", tmp_path / "out") == 1
    assert (tmp_path / ".out.partial").is_dir()
    assert export(*words, "--adapters", tmp_path / "two", "--output_dir", tmp_path / "out") == 0
    assert export(*words, "--adapters", tmp_path / "two", "--output_dir", tmp_path / "fresh") == 0
    for file in ("__0_0.distcp", "__0_1.distcp"):
        assert (tmp_path / "out/iter_0000001" / file).read_bytes() == (
            tmp_path / "fresh/iter_0000001" / file
        ).read_bytes()


@pytest.mark.parametrize("case", CASES)
def test_merging_on_every_path_gives_the_same_bytes(case: str, tmp_path: Path) -> None:
    """HF base -> HF; HF base -> Megatron -> HF; Megatron base and Megatron adapter -> HF; experts included."""
    build_hf(config_of(case), tmp_path / "hf")
    make_adapter(tmp_path / "hf", tmp_path / "peft", case)
    add_expert_adapters(tmp_path / "peft", case)
    kind, merge = ("--model_type", NAMES[case]), ("--merge_lora", "true")
    hf, peft = ("--model", tmp_path / "hf"), ("--adapters", tmp_path / "peft")
    assert export(*hf, *kind, *peft, *merge, "--output_dir", tmp_path / "a") == 0
    assert export(*hf, *kind, *peft, *merge, "--to_mcore", "true", "--output_dir", tmp_path / "b-mcore") == 0
    assert export("--mcore_model", tmp_path / "b-mcore", *kind, "--to_hf", "true", "--output_dir", tmp_path / "b") == 0
    assert export(*hf, *kind, "--to_mcore", "true", "--output_dir", tmp_path / "base") == 0
    assert export(*hf, *kind, *peft, "--to_mcore", "true", "--output_dir", tmp_path / "adapter") == 0
    both = ("--mcore_model", tmp_path / "base", "--mcore_adapter", tmp_path / "adapter")
    assert export(*both, *kind, *merge, "--to_hf", "true", "--output_dir", tmp_path / "c") == 0
    a, b, c = (load_file(tmp_path / d / "model.safetensors") for d in "abc")
    reference = plain_merge(
        load_file(tmp_path / "hf/model.safetensors"), load_file(tmp_path / "peft/adapter_model.safetensors"), 12 / 4
    )
    assert a.keys() == b.keys() == c.keys() == reference.keys()
    for name in a:
        assert torch.equal(a[name], b[name]) and torch.equal(a[name], c[name]), name
        torch.testing.assert_close(a[name], reference[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("stacked", [False, True])
def test_adapters_of_other_megatron_tools(stacked: bool, tmp_path: Path) -> None:
    """One shared A under linear_qkv and linear_fc1, B in Megatron's row order, with or without stacked layers."""
    import torch.distributed.checkpoint as dcp

    config = config_of("qwen3:default")
    build_hf(config, tmp_path / "hf")
    bound = bind_map(config)
    generator, state, per_layer = torch.Generator().manual_seed(1), {}, {}
    for entry in bound.entries:
        if entry.stack and len(entry.shape) == 2:
            module = entry.mcore.removesuffix(".weight")
            for part, shape in (("A", (4, entry.shape[1])), ("B", (entry.shape[0], 4))):
                per_layer[f"{module}.lora_{part}.default.weight"] = torch.randn(shape, generator=generator)
    if stacked:
        for key in {re.sub(r"layers\.\d+\.", "layers.", k) for k in per_layer}:
            layers = [per_layer[key.replace("layers.", f"layers.{i}.", 1)] for i in range(config["num_hidden_layers"])]
            state[key] = torch.stack(layers)
    else:
        state = dict(per_layer)
    iteration = tmp_path / "foreign/iter_0000005"
    dcp.save(state, checkpoint_id=iteration, no_dist=True)
    (tmp_path / "foreign/latest_checkpointed_iteration.txt").write_text("5")
    (tmp_path / "foreign/adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 0.05, "target_modules": ["linear_qkv", "linear_fc1"]})
    )
    base = ("--model", tmp_path / "hf", "--model_type", "qwen3")
    assert (
        export(*base, "--mcore_adapter", tmp_path / "foreign", "--to_hf", "true", "--output_dir", tmp_path / "p") == 0
    )
    back = load_file(tmp_path / "p/adapter_model.safetensors")
    fused = per_layer["decoder.layers.1.self_attention.linear_qkv.lora_B.default.weight"]
    groups = config["num_key_value_heads"]
    per_group = fused.view(groups, -1, config["head_dim"], 4)
    heads = config["num_attention_heads"] // groups
    prefix = "base_model.model.model.layers.1"
    assert torch.equal(back[f"{prefix}.self_attn.q_proj.lora_B.weight"], per_group[:, :heads].reshape(-1, 4))
    assert torch.equal(back[f"{prefix}.self_attn.v_proj.lora_B.weight"], per_group[:, heads + 1].reshape(-1, 4))
    shared = per_layer["decoder.layers.1.mlp.linear_fc1.lora_A.default.weight"]
    for name in ("gate_proj", "up_proj"):
        assert torch.equal(back[f"{prefix}.mlp.{name}.lora_A.weight"], shared)
    words = ("--mcore_adapter", tmp_path / "foreign", "--merge_lora", "true", "--output_dir", tmp_path / "merged")
    assert export(*base, *words) == 0
    logits = logits_of(tmp_path / "hf", tmp_path / "p")
    assert (logits - logits_of(tmp_path / "hf")).abs().max() > 0.1
    torch.testing.assert_close(logits_of(tmp_path / "merged"), logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("case", ["glm4_5:default", "moonlight:default"])
def test_packed_experts_become_pairs_per_expert(case: str, tmp_path: Path) -> None:
    """peft's packed adapter -> Megatron -> PEFT per expert; merging either gives the same model."""
    build_hf(config_of(case), tmp_path / "hf")
    make_adapter(tmp_path / "hf", tmp_path / "peft", case)
    packed = [n for n in load_file(tmp_path / "peft/adapter_model.safetensors") if PACKED.search(n)]
    assert bool(packed) == (transformers.__version__ >= "5")
    base = ("--model", tmp_path / "hf", "--model_type", NAMES[case])
    assert export(*base, "--adapters", tmp_path / "peft", "--to_mcore", "true", "--output_dir", tmp_path / "m") == 0
    assert export(*base, "--mcore_adapter", tmp_path / "m", "--to_hf", "true", "--output_dir", tmp_path / "back") == 0
    merge = ("--merge_lora", "true", "--output_dir")
    assert export(*base, "--adapters", tmp_path / "peft", *merge, tmp_path / "a") == 0
    assert export(*base, "--adapters", tmp_path / "back", *merge, tmp_path / "b") == 0
    a, b = (load_file(tmp_path / d / "model.safetensors") for d in "ab")
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-6, atol=1e-6)


def test_what_peft_packs_is_divided_again(tmp_path: Path) -> None:
    """One pair per expert, loaded and saved by peft, which joins gate and up: the same bytes."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    build_hf(config_of("glm4_5:default"), tmp_path / "hf")
    make_adapter(tmp_path / "hf", tmp_path / "peft", "glm4_5:default")
    add_expert_adapters(tmp_path / "peft", "glm4_5:default")
    tensors = load_file(tmp_path / "peft/adapter_model.safetensors")
    tensors = {n: t for n, t in tensors.items() if not n.startswith("base_model.model.model.layers.4.")}  # no MTP there
    save_file(tensors, tmp_path / "peft/adapter_model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    PeftModel.from_pretrained(model, tmp_path / "peft").save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved/adapter_model.safetensors")
    assert any(PACKED.search(n) for n in saved) == (transformers.__version__ >= "5")
    words = ("--model", tmp_path / "hf", "--model_type", "glm4_5", "--adapters", tmp_path / "saved", "--to_hf", "true")
    assert export(*words, "--output_dir", tmp_path / "back") == 0
    back = load_file(tmp_path / "back/adapter_model.safetensors")
    experts = [n for n in tensors if ".experts." in n]
    assert experts and all(torch.equal(tensors[n], back[n]) for n in experts)
    torch.testing.assert_close(
        logits_of(tmp_path / "hf", tmp_path / "back"), logits_of(tmp_path / "hf", tmp_path / "peft")
    )


def test_scale_follows_alpha_pattern_and_rslora() -> None:
    config = LoraConfig.from_dict({"r": 8, "lora_alpha": 16, "alpha_pattern": {"q_proj": 32}})
    assert config.scale("model.layers.0.self_attn.q_proj", 8) == 4
    assert config.scale("model.layers.0.self_attn.k_proj", 8) == 2
    assert LoraConfig.from_dict({"r": 4, "lora_alpha": 8, "use_rslora": True}).scale("x", 4) == 4


SPOILERS: dict[str, tuple[Any, str]] = {
    "other model": (lambda t, c: t.update({"base_model.model.model.layers.99.x.lora_A.weight": torch.ones(4, 4)}),
                    "layers.99.x.lora_A.weight in .* belongs to no weight"),
    "half a pair": (lambda t, c: t.pop(next(n for n in t if "lora_B" in n)), "lora_B.weight is missing"),
    "wrong shape": (lambda t, c: t.update({n: torch.ones(4, 3) for n in [next(n for n in t if "lora_A" in n)]}),
                    "the base model needs"),
    "dora": (lambda t, c: c.update(use_dora=True), "use_dora True is not supported"),
    "no rank": (lambda t, c: c.pop("r"), "r is None; it must be a whole number from 1 to"),
    "embeddings too": (lambda t, c: c.update(modules_to_save=["lm_head"]), "modules_to_save names lm_head, but"),
    "transposed": (lambda t, c: c.update(fan_in_fan_out=True), "fan_in_fan_out True is not supported"),
    "other kind": (lambda t, c: c.update(peft_type="IA3"), "peft_type 'IA3'"),
}  # fmt: skip


@pytest.mark.parametrize("spoiler", SPOILERS)
def test_bad_adapters(spoiler: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build_hf(config_of("qwen3:default"), tmp_path / "hf")
    make_adapter(tmp_path / "hf", tmp_path / "peft", "qwen3:default")
    tensors = load_file(tmp_path / "peft/adapter_model.safetensors")
    config = json.loads((tmp_path / "peft/adapter_config.json").read_text())
    change, message = SPOILERS[spoiler]
    change(tensors, config)
    save_file(tensors, tmp_path / "peft/adapter_model.safetensors")
    (tmp_path / "peft/adapter_config.json").write_text(json.dumps(config))
    words = ("--model", tmp_path / "hf", "--model_type", "qwen3", "--adapters", tmp_path / "peft")
    assert export(*words, "--to_mcore", "true", "--output_dir", tmp_path / "out") == 1
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


@pytest.mark.dist
def test_several_processes_share_a_merge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_hf(config_of("glm4_5:default"), tmp_path / "hf")
    make_adapter(tmp_path / "hf", tmp_path / "peft", "glm4_5:default")
    monkeypatch.chdir(tmp_path)
    environment = {**os.environ, "NPROC_PER_NODE": "2", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    words = ["--model", "hf", "--model_type", "glm4_5", "--adapters", "peft", "--verify", "bitwise"]
    for options in (["--merge_lora", "true", "--max_shard_size", "200KB"], ["--to_mcore", "true"]):
        assert export(*words, *options, "--output_dir", "one") == 0
        command = [sys.executable, "-m", "swiftlite", "export", *words, *options, "--output_dir", "two"]
        result = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert result.returncode == 0, result.stderr[-2000:]
        outputs = []
        for output in map(Path, ("one", "two")):
            files = (p for p in output.rglob("*") if p.suffix in (".safetensors", ".distcp", ".json"))
            outputs.append({p.name: p.read_bytes() for p in files if p.name != "args.json"})  # names its directory
            shutil.rmtree(output)
        assert outputs[0] == outputs[1] and outputs[0]
