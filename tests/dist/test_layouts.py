"""Training under parallel layouts equals training in one process, step by step; runs resume after they were killed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from swiftlite.families import MODEL_MAPPING
from tests.dist.launch import MODEL_TYPES, MODELS, curve, largest_difference, run_cases, run_layouts

pytestmark = pytest.mark.dist

STEPS = 8
FEWER = 4  # of models with blocks of their own
RESUMED = 6
TOLERANCE = 1e-5  # relative, of loss and gradient norm, in fp32

# Samples of different lengths: ranks hold different data under data and expert parallelism.
ROWS = [
    {"messages": [{"role": "user", "content": f"What is {i} plus {i}?"},
                  {"role": "assistant", "content": f"It is {2 * i}. " + "The capital of France is Paris. " * (i % 4)}]}
    for i in range(8)
]  # fmt: skip

_TP2_SP = ["--tensor_model_parallel_size", "2", "--sequence_parallel", "true"]
_PP2 = ["--pipeline_model_parallel_size", "2", "--decoder_first_pipeline_num_layers", "1"]
_CP2 = ["--context_parallel_size", "2"]
# Four micro batches instead of two: ranks that share the batch sum over some, interleaved stages need as many.
_SMALL = ["--micro_batch_size", "2"]
# family, world size, flags besides the common ones, fault
LAYOUTS: dict[str, tuple[str, int, list[str], str | None]] = {
    "dense-dp2": ("qwen3", 2, _SMALL, None),
    "dense-tp2-sp": ("qwen3", 2, ["--tensor_model_parallel_size", "2", "--sequence_parallel", "true"], None),
    "dense-tp2-sp-chunks": ("qwen3", 2, [*_TP2_SP, "--loss_chunk_size", "50"], None),
    "multipliers-tp2-chunks": (
        "granite", 2, ["--tensor_model_parallel_size", "2", "--loss_chunk_size", "50"], None,
    ),
    "dense-pp2": ("qwen3", 2, ["--pipeline_model_parallel_size", "2", "--decoder_first_pipeline_num_layers", "1"], None),
    "dense-pp2-layout": ("qwen3", 2, ["--pipeline_model_parallel_size", "2", "--pipeline_model_parallel_layout", "Et*3|tL",
                                     "--loss_chunk_size", "50"], None),
    "dense-vpp2-layout": (
        "qwen3", 2, [*_SMALL, "--pipeline_model_parallel_size", "2", "--pipeline_model_parallel_layout", "Et|tt|t|L"], None,
    ),
    "moe-pp2-account": (
        "glm4_moe", 2, ["--pipeline_model_parallel_size", "2", "--account_for_loss_in_pipeline_split", "true"], None,
    ),
    "dense-vpp2": (
        "qwen3", 2, [*_SMALL, "--pipeline_model_parallel_size", "2", "--num_virtual_stages_per_pipeline_rank", "2"], None,
    ),
    "moe-ep2": ("glm4_moe", 2, [*_SMALL, "--expert_model_parallel_size", "2"], None),
    "moe-ep2-grouped": (
        "glm4_moe", 2, ["--expert_model_parallel_size", "2", "--moe_grouped_impl", "torch"], None,
    ),
    "moe-tp2": ("glm4_moe", 2, ["--tensor_model_parallel_size", "2"], None),
    "moe-pp2": ("glm4_moe", 2, [*_SMALL, *_PP2], None),
    "dense-cp2": ("qwen3", 2, _CP2, None),
    "moe-cp2-ep2": ("glm4_moe", 2, [*_CP2, "--expert_model_parallel_size", "2"], None),
    "dense-tp2-cp2": (
        "qwen3", 4, [*_CP2, "--tensor_model_parallel_size", "2", "--sequence_parallel", "true"], None,
    ),
    "dense-cp2-pp2": ("qwen3", 4, [*_CP2, "--pipeline_model_parallel_size", "2"], None),
    "dense-tp2-pp2": (
        "qwen3", 4,
        ["--tensor_model_parallel_size", "2", "--sequence_parallel", "true", "--pipeline_model_parallel_size", "2"],
        None,
    ),
    "moe-tp2-ep2": ("glm4_moe", 4, ["--tensor_model_parallel_size", "2", "--expert_model_parallel_size", "2"], None),
    "post-norms-tp2-sp": ("glm4_0414", 2, _TP2_SP, None),
    "post-norms-pp2": ("glm4_0414", 2, _PP2, None),
    "full-qk-norm-tp2-sp": ("olmo2", 2, _TP2_SP, None),
    "full-qk-norm-tp2": ("olmo2", 2, ["--tensor_model_parallel_size", "2"], None),
    "full-qk-norm-pp2": ("olmo2", 2, _PP2, None),
    "multipliers-tp2-sp": ("granite", 2, _TP2_SP, None),
    "multipliers-pp2": ("granite", 2, _PP2, None),
    "zero-centred-tp2-sp": ("gemma3_text", 2, _TP2_SP, None),
    "zero-centred-pp2": ("gemma3_text", 2, _PP2, None),
    "norm-after-rope-ep2": ("hunyuan_v1_moe", 2, ["--expert_model_parallel_size", "2"], None),
    "norm-after-rope-tp2-sp": ("hunyuan_v1_moe", 2, _TP2_SP, None),
    "sinks-tp2-sp": ("gpt_oss", 2, _TP2_SP, None),
    "sinks-pp2": ("gpt_oss", 2, _PP2, None),
    "sinks-ep2": ("gpt_oss", 2, ["--expert_model_parallel_size", "2"], None),
    "caps-tp2-sp": ("gemma2", 2, _TP2_SP, None),
    "caps-pp2": ("gemma2", 2, _PP2, None),
    "position-factor-tp2-sp": ("ministral3", 2, _TP2_SP, None),
    "position-factor-pp2": ("ministral3", 2, _PP2, None),
    "linear-tp2-sp": ("qwen3_next", 2, _TP2_SP, None),
    "linear-tp4-sp": (  # two ranks share a key/value head
        "qwen3_next", 4, ["--tensor_model_parallel_size", "4", "--sequence_parallel", "true"], None,
    ),
    "linear-pp2": ("qwen3_next", 2, ["--pipeline_model_parallel_size", "2"], None),
    "linear-ep2": ("qwen3_next", 2, ["--expert_model_parallel_size", "2"], None),
    "linear-cp2": ("qwen3_next", 2, _CP2, None),
    "chunks-tp2-sp": ("llama4_text", 2, _TP2_SP, None),
    "chunks-ep2": ("llama4_text", 2, ["--expert_model_parallel_size", "2"], None),
    "groups-tp2-sp": ("glm_moe_dsa", 2, _TP2_SP, None),
    "groups-pp2": ("glm_moe_dsa", 2, _PP2, None),
    "groups-ep2": ("glm_moe_dsa", 2, ["--expert_model_parallel_size", "2"], None),
    "control-double-layer": ("qwen3", 2, [], "double_layer"),
    "control-cp2-in-order": ("qwen3", 2, _CP2, "places_in_order"),
    "control-cp2-one-rank": ("qwen3", 2, _CP2, "loss_of_one_rank"),
    "control-skip-norm-reduce": (
        "qwen3", 2, ["--tensor_model_parallel_size", "2", "--sequence_parallel", "true"], "skip_norm_reduce",
    ),
}  # fmt: skip
_ROUTER = [
    "--micro_batch_size", "2", "--train_iters", "3", "--moe_aux_loss_coeff", "0.5", "--moe_z_loss_coeff", "0.1",
    "--moe_router_bias_update_rate", "0.01",
]  # fmt: skip
_CAPACITY = [*_ROUTER, "--moe_expert_capacity_factor", "0.7", "--moe_pad_expert_input_to_capacity", "true"]
_EP2 = ["--expert_model_parallel_size", "2"]
# Padding, router losses, expert bias, capacity, dispatchers that want equal lengths. Each layout equals the run in one
# process that its name begins with.
ROUTERS: dict[str, tuple[str, int, list[str], str | None]] = {
    "router": ("glm4_moe", 1, _ROUTER, None),
    "router-dp2": ("glm4_moe", 2, _ROUTER, None),
    "router-ep2-allgather": ("glm4_moe", 2, [*_ROUTER, *_EP2, "--moe_token_dispatcher_type", "allgather"], None),
    "router-tp2": ("glm4_moe", 2, [*_ROUTER, "--tensor_model_parallel_size", "2"], None),
    "router-cp2": ("glm4_moe", 2, [*_ROUTER, *_CP2], None),
    "router-pp2-recompute": (
        "glm4_moe", 2,
        [*_ROUTER, "--pipeline_model_parallel_size", "2", "--decoder_first_pipeline_num_layers", "2", "--recompute", "full"],
        None,
    ),
    "capacity": ("glm4_moe", 1, _CAPACITY, None),
    "capacity-ep2": ("glm4_moe", 2, [*_CAPACITY, *_EP2], None),
    "mean": ("glm4_moe", 1, [*_ROUTER, "--calculate_per_token_loss", "false"], None),
    "mean-cp2": ("glm4_moe", 2, [*_ROUTER, *_CP2, "--calculate_per_token_loss", "false"], None),
    "mean-ep2": ("glm4_moe", 2, [*_ROUTER, *_EP2, "--calculate_per_token_loss", "false"], None),
}  # fmt: skip
EQUAL = [name for name in LAYOUTS if not name.startswith("control-")]
CONTROLS = [name for name in LAYOUTS if name.startswith("control-")]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.fixture(scope="module")
def argv(tiny_model: Callable[..., Path], data: Path) -> Callable[..., list[str]]:
    """`argv("qwen3", OUTPUT_DIR, *flags)`: the same 8 samples at every step, a constant learning rate of 3e-3."""

    def make(family: str, output_dir: Path, *flags: str) -> list[str]:
        common = {
            "model": tiny_model(family, **MODELS[family]), "model_type": MODEL_TYPES.get(family, family), "dataset": data,
            "output_dir": output_dir, "torch_dtype": "float32", "micro_batch_size": 4, "global_batch_size": 8,
            "train_iters": STEPS, "lr": 3e-3, "lr_decay_style": "constant", "logging_steps": 1, "save_steps": 1000,
            "save_weights_only": "true", "report_to": "none",
            # Adam divides gradients of 1e-8 by themselves, so rounding in them would grow to whole steps.
            "adam_eps": 1e-5,
        }  # fmt: skip
        if MODEL_MAPPING[common["model_type"]].template is None:
            common["template"] = "qwen3"
        return [word for name, value in common.items() for word in (f"--{name}", str(value))] + list(flags)

    return make


@pytest.fixture(scope="module")
def curves(argv: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The curve of every layout, and of one process for each family under its name."""
    root = tmp_path_factory.mktemp("layouts")
    layouts = {
        name: (family, size, flags if family in MODEL_TYPES else [*flags, "--train_iters", str(FEWER)], fault)
        for name, (family, size, flags, fault) in LAYOUTS.items()
    }
    runs = {family: (family, 1, [], None) for family in MODELS} | layouts | ROUTERS
    run_layouts(runs, lambda family, output, flags: {"argv": argv(family, output, *flags)}, root)
    return {name: curve(root / name) for name in runs}


@pytest.mark.parametrize("family", MODELS)
def test_the_batch_is_learnable(curves: dict[str, Any], family: str) -> None:
    losses = [loss for loss, _ in curves[family]]
    assert len(losses) == STEPS
    assert losses[-1] < 0.75 * losses[0]


@pytest.mark.parametrize("name", EQUAL)
def test_layout_equals_one_process(curves: dict[str, Any], name: str) -> None:
    family = LAYOUTS[name][0]
    steps = STEPS if family in MODEL_TYPES else FEWER
    assert largest_difference(curves[family][:steps], curves[name]) <= TOLERANCE


@pytest.mark.parametrize("name", [name for name in ROUTERS if "-" in name])
def test_routers_equal_those_of_one_process(curves: dict[str, Any], name: str) -> None:
    assert largest_difference(curves[name.partition("-")[0]], curves[name]) <= TOLERANCE


@pytest.mark.parametrize("name", CONTROLS)
def test_a_planted_mistake_is_seen(curves: dict[str, Any], name: str) -> None:
    assert largest_difference(curves[LAYOUTS[name][0]], curves[name]) > 100 * TOLERANCE


SAVE = ["--train_iters", str(RESUMED), "--save_steps", "3", "--save_weights_only", "false"]
# world size and flags of the run that ends early, and of the one that resumes
RESUMES: dict[str, tuple[str, tuple[int, list[str]], tuple[int, list[str]]]] = {
    "dense-dp2": ("qwen3", (2, []), (2, [])),
    "dense-tp2-to-pp2": (
        "qwen3", (2, ["--tensor_model_parallel_size", "2"]), (2, ["--pipeline_model_parallel_size", "2"]),
    ),
    "dense-pp2-to-dp2": (
        "qwen3", (2, ["--pipeline_model_parallel_size", "2", "--pipeline_model_parallel_layout", "Et|t*3,L"]), (2, []),
    ),
    "moe-ep2-to-tp2": (
        "glm4_moe", (2, ["--expert_model_parallel_size", "2"]), (2, ["--tensor_model_parallel_size", "2"]),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RESUMES)
def test_a_killed_run_goes_on_under_any_layout(
    name: str, argv: Callable[..., list[str]], curves: dict[str, Any], tmp_path: Path
) -> None:
    family, (size, flags), (next_size, next_flags) = RESUMES[name]
    output_dir = tmp_path / "run"
    cases = [(size, {"argv": argv(family, output_dir, *SAVE, *flags), "fault": "end_after_5"})]
    cases += [(next_size, {"argv": argv(family, output_dir, *SAVE, *next_flags)})]
    (code, log), (next_code, next_log) = (run_cases(processes, [case]) for processes, case in cases)
    assert code == 0, log[-5000:]
    assert next_code == 0, next_log[-5000:]
    assert "resuming from step 3" in next_log
    assert largest_difference(curves[family][:RESUMED], curve(output_dir)) <= TOLERANCE


def test_a_kill_while_saving_leaves_the_checkpoint_before(
    argv: Callable[..., list[str]], curves: dict[str, Any], tmp_path: Path
) -> None:
    output_dir = tmp_path / "run"
    case = {"argv": argv("qwen3", output_dir, *SAVE)}
    assert run_cases(1, [case | {"fault": "kill_in_save"}])[0] != 0
    assert (output_dir / "latest_checkpointed_iteration.txt").read_text() == "3"
    assert not (output_dir / "iter_0000006").exists()
    code, log = run_cases(1, [case])
    assert code == 0, log[-5000:]
    assert (output_dir / "iter_0000006").is_dir()
    assert not list(output_dir.glob(".*saving*"))
    assert largest_difference(curves["qwen3"][:RESUMED], curve(output_dir)) <= TOLERANCE


def test_a_kill_while_saving_in_the_background_leaves_the_checkpoint_before(
    argv: Callable[..., list[str]], curves: dict[str, Any], tmp_path: Path
) -> None:
    output_dir = tmp_path / "run"
    flags = [*SAVE, "--save_steps", "2", "--async_save", "true"]
    flags += ["--tensor_model_parallel_size", "2"]
    case = {"argv": argv("qwen3", output_dir, *flags)}
    assert run_cases(2, [case | {"fault": "kill_in_background"}])[0] != 0
    assert (output_dir / "latest_checkpointed_iteration.txt").read_text() == "2"
    assert not (output_dir / "iter_0000004").exists()
    code, log = run_cases(2, [case])
    assert code == 0, log[-5000:]
    assert "resuming from step 2" in log
    assert [p.name for p in sorted(output_dir.glob("iter_*"))] == [f"iter_{i:07d}" for i in (2, 4, 6)]
    assert largest_difference(curves["qwen3"][:RESUMED], curve(output_dir)) <= TOLERANCE
