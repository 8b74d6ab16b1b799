"""LoRA, frozen parameters and MLA under parallel layouts equal one process, step by step; killed runs resume elsewhere."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from swiftlite.train.plot import read_run
from tests.dist.launch import MODEL_TYPES, curve, largest_difference, run_cases, run_layouts
from tests.dist.test_layouts import ROWS, TOLERANCE

pytestmark = pytest.mark.dist

STEPS = 8
SMALL = ["--micro_batch_size", "2"]  # see test_layouts.py
TP = ["--tensor_model_parallel_size", "2", "--sequence_parallel", "true"]
TP_ONLY = ["--tensor_model_parallel_size", "2"]
PP = ["--pipeline_model_parallel_size", "2"]
EP = ["--expert_model_parallel_size", "2"]
CP = ["--context_parallel_size", "2"]
UNEVEN = ["--decoder_first_pipeline_num_layers", "1"]

# What is trained, by name: family and flags.
KINDS: dict[str, tuple[str, list[str]]] = {
    "dense": ("qwen3", ["--enable_channel_loss", "true"]),
    "some": ("qwen3", ["--target_modules", "q_proj", "v_proj", "up_proj", "--lr", "9e-3"]),
    "moe": ("glm4_moe", ["--lr", "8e-3"]),
    "rows": ("qwen3", ["--new_special_tokens", "Paris", "What"]),
    "moe-rows": ("glm4_moe", ["--lr", "8e-3", "--new_special_tokens", "Paris", "What"]),
    "whole": ("qwen3", ["--modules_to_save", "embed_tokens", "norm"]),
    "moe-whole": ("glm4_moe", ["--lr", "2e-3", "--modules_to_save", "gate", "lm_head"]),
    "mla": ("moonlight", []),
    "mla-full": ("moonlight", ["--train_type", "full", "--lr", "1e-3"]),
    "fused": ("glm4_0414", ["--template", "qwen3", "--lr", "6e-3"]),
    "linear": ("qwen3_next", []),
    "freeze": ("qwen3", ["--train_type", "freeze", "--trainable_parameters", "model.layers.2.", "model.layers.3."]),
}  # fmt: skip
# kind, world size, flags, fault
LAYOUTS: dict[str, tuple[str, int, list[str], str | None]] = {
    "dense-dp2": ("dense", 2, SMALL, None),
    "dense-dp2-overlap": ("dense", 2, ["--overlap_grad_reduce", "true", "--overlap_param_gather", "true"], None),
    "dense-tp2-sp": ("dense", 2, TP, None),
    "dense-cp2": ("dense", 2, CP, None),
    "moe-cp2": ("moe", 2, CP, None),
    "rows-cp2": ("rows", 2, CP, None),
    "mla-cp2": ("mla", 2, CP, None),
    "dense-tp2": ("dense", 2, TP_ONLY, None),
    "dense-pp2": ("dense", 2, [*PP, *UNEVEN], None),
    "dense-vpp2": ("dense", 2, [*PP, "--num_virtual_stages_per_pipeline_rank", "2"], None),
    "dense-pp2-recompute": ("dense", 2, [*PP, "--recompute", "full"], None),
    "some-tp2-sp": ("some", 2, TP, None),
    "moe-dp2": ("moe", 2, SMALL, None),
    "moe-ep2": ("moe", 2, EP, None),
    "moe-tp2": ("moe", 2, TP, None),
    "moe-tp2-etp1": ("moe", 2, [*TP, "--expert_tensor_parallel_size", "1"], None),
    "moe-pp2": ("moe", 2, [*PP, *UNEVEN], None),
    "rows-dp2": ("rows", 2, [], None),
    "rows-tp2": ("rows", 2, TP_ONLY, None),
    "rows-tp2-sp": ("rows", 2, TP, None),
    "moe-rows-tp2-sp": ("moe-rows", 2, TP, None),
    "moe-rows-pp2": ("moe-rows", 2, [*PP, *UNEVEN], None),
    "whole-tp2-sp": ("whole", 2, TP, None),
    "whole-pp2": ("whole", 2, [*PP, *UNEVEN], None),  # the embedding is on both stages
    "moe-whole-ep2": ("moe-whole", 2, EP, None),
    "moe-whole-tp2-sp": ("moe-whole", 2, TP, None),
    "mla-tp2": ("mla", 2, TP, None),
    "mla-ep2": ("mla", 2, EP, None),
    "mla-full-tp2": ("mla-full", 2, TP, None),
    "fused-tp2-sp": ("fused", 2, TP, None),
    "linear-tp2-sp": ("linear", 2, TP, None),
    "linear-ep2": ("linear", 2, EP, None),
    "freeze-pp2": ("freeze", 2, PP, None),  # nothing of the first stage is trained
    "freeze-tp2-sp": ("freeze", 2, TP, None),
    "dense-tp2-pp2": ("dense", 4, [*TP, *PP], None),
    "moe-tp2-ep2": ("moe", 4, [*TP, *EP], None),
    "moe-tp2-ep2-etp1": ("moe", 4, [*TP, *EP, "--expert_tensor_parallel_size", "1"], None),
    "control-double-layer": ("dense", 2, [], "double_layer"),
    "control-skip-reduce": ("dense", 2, TP, "skip_norm_reduce"),
}
EQUAL = [name for name in LAYOUTS if not name.startswith("control-")]
CONTROLS = [name for name in LAYOUTS if name.startswith("control-")]


@pytest.fixture(scope="module")
def models(tiny_model: Callable[..., Path], tiny_mla: Callable[[int], Path]) -> dict[str, Path]:
    changes = {"vocab_size": 333}
    return {
        "qwen3": tiny_model("qwen3", num_hidden_layers=4, tie_word_embeddings=True, **changes),
        "glm4_moe": tiny_model("glm4_moe", **changes),
        "glm4_0414": tiny_model("glm4_0414", num_key_value_heads=2),
        "qwen3_next": tiny_model("qwen3_next", layer_types=["linear_attention", "full_attention"] * 2),
        "moonlight": tiny_mla(0),
    }


@pytest.fixture(scope="module")
def argv(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[str]]:
    """`argv("dense", OUTPUT_DIR, *flags)`: the same 8 samples at every step."""
    data = tmp_path_factory.mktemp("data") / "data.jsonl"
    data.write_text("".join(json.dumps({**row, "channel": "ab"[i % 2]}) + "\n" for i, row in enumerate(ROWS)))

    def make(kind: str, output_dir: Path, *flags: str) -> list[str]:
        family, own = KINDS[kind]
        common = {
            "model": models[family], "model_type": MODEL_TYPES.get(family, family), "dataset": data,
            "output_dir": output_dir,
            "torch_dtype": "float32", "micro_batch_size": 4, "global_batch_size": 8, "train_iters": STEPS, "lr": 4e-3,
            "lr_decay_style": "constant", "logging_steps": 1, "save_steps": 1000, "train_type": "lora",
            "lora_rank": 16, "lora_alpha": 16, "lora_dropout": 0, "adam_eps": 1e-5, "report_to": "none",
            "save_total_limit": 9,
        }  # fmt: skip
        settings = [word for name, value in common.items() for word in (f"--{name}", str(value))]
        return [*settings, *own, *flags]

    return make


@pytest.fixture(scope="module")
def root(argv: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds the run of every layout, and of one process for each kind."""
    root = tmp_path_factory.mktemp("layouts")
    runs = {kind: (kind, 1, [], None) for kind in KINDS} | LAYOUTS
    run_layouts(runs, lambda kind, output, flags: {"argv": argv(kind, output, *flags)}, root)
    return root


@pytest.mark.parametrize("kind", KINDS)
def test_the_batch_is_learnable(root: Path, kind: str) -> None:
    losses = [loss for loss, _ in curve(root / kind)]
    assert len(losses) == STEPS
    assert losses[-1] < 0.75 * losses[0]


@pytest.mark.parametrize("name", EQUAL)
def test_layout_equals_one_process(root: Path, name: str) -> None:
    assert largest_difference(curve(root / LAYOUTS[name][0]), curve(root / name)) <= TOLERANCE


@pytest.mark.parametrize("name", ["dense-dp2", "dense-tp2-sp", "dense-cp2", "dense-pp2"])
def test_losses_of_channels_are_of_all_ranks(root: Path, name: str) -> None:
    one, two = (
        [[line["loss"], line["loss_a"], line["loss_b"]] for line in read_run(root / run / "logging.jsonl")]
        for run in ("dense", name)
    )
    assert len(one) == len(two) == STEPS
    for mine, theirs in zip(one, two, strict=True):
        assert mine == pytest.approx(theirs, rel=TOLERANCE)
    assert max(abs(a - b) for _, a, b in two) > 0.01


@pytest.mark.parametrize("name", [name for name in EQUAL if "full" not in name and "freeze" not in name])
def test_saved_adapters_equal_those_of_one_process(root: Path, name: str) -> None:
    one, two = (load_file(root / d / f"iter_{STEPS:07d}/adapter_model.safetensors") for d in (LAYOUTS[name][0], name))
    assert set(one) == set(two)
    for key, tensor in one.items():
        torch.testing.assert_close(two[key], tensor, rtol=1e-3, atol=1e-5, msg=key)


@pytest.mark.parametrize("name", CONTROLS)
def test_a_planted_mistake_is_seen(root: Path, name: str) -> None:
    assert largest_difference(curve(root / LAYOUTS[name][0]), curve(root / name)) > 100 * TOLERANCE


# kind; world size and flags of the run that ends early, and of the one that resumes
RESUMES: dict[str, tuple[str, tuple[int, list[str]], tuple[int, list[str]]]] = {
    "dense-tp2-to-pp2": ("dense", (2, TP), (2, PP)),
    "dense-dp2-to-one": ("dense", (2, []), (1, [])),
    "moe-ep2-to-tp2": ("moe", (2, EP), (2, TP)),
    "moe-rows-tp2-to-pp2": ("moe-rows", (2, TP), (2, [*PP, *UNEVEN])),
    "whole-tp2-to-pp2": ("whole", (2, TP), (2, PP)),
    "freeze-pp2-to-dp2": ("freeze", (2, PP), (2, [])),
}


@pytest.mark.parametrize("name", RESUMES)
def test_a_killed_run_goes_on_under_any_layout(
    name: str, argv: Callable[..., list[str]], root: Path, tmp_path: Path
) -> None:
    kind, (size, flags), (next_size, next_flags) = RESUMES[name]
    save = ["--save_steps", "4"]
    cases = [(size, {"argv": argv(kind, tmp_path / "run", *save, *flags), "fault": "end_after_6"})]
    cases += [(next_size, {"argv": argv(kind, tmp_path / "run", *save, *next_flags)})]
    (code, log), (next_code, next_log) = (run_cases(processes, [case]) for processes, case in cases)
    assert code == 0, log[-5000:]
    assert next_code == 0, next_log[-5000:]
    assert "resuming from step 4" in next_log
    assert largest_difference(curve(root / kind), curve(tmp_path / "run")) <= TOLERANCE
