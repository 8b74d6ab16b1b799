"""`swiftlite port`: shell scripts are read as the shell reads them, and nothing of them is run."""

from __future__ import annotations

from pathlib import Path

import pytest

from swiftlite.cli.main import main
from swiftlite.cli.port import find_commands

SCRIPT = r"""#!/bin/bash
# swift sft --model commented/out
set -e
export CUDA_VISIBLE_DEVICES=0,1
MODEL=Qwen/Qwen3-8B
nproc=2
echo "swift sft --model in/text" > FILE
touch FILE
mkdir -p out && NPROC_PER_NODE=$nproc \
swift sft \
    --model ${MODEL} \
    --train_type lora \
    --dataset 'a.jsonl#500' \
              b.jsonl \
    --gradient_accumulation_steps $(expr 16 / $nproc) \
    --micro_batch_size $((nproc * 2)) \
    --system "You are $WHAT" \
    --dataset_num_proc $(nproc) \
    --output_dir ${OUT:-out}/run \
    --deepspeed zero2 2>&1 | tee log.txt
echo done
for beta in 0.1; do megatron rlhf --rlhf_type dpo --model $MODEL --beta $beta --dataset $DATA; done
"""


def test_commands_are_found_as_the_shell_would_run_them() -> None:
    sft, dpo = find_commands(SCRIPT)
    assert sft.line == 9 and sft.environment == ["NPROC_PER_NODE=2"]
    assert sft.words == [
        "sft", "--model", "Qwen/Qwen3-8B", "--train_type", "lora", "--dataset", "a.jsonl#500", "b.jsonl",
        "--gradient_accumulation_steps", "8", "--micro_batch_size", "4", "--system", "You are $WHAT",
        "--dataset_num_proc", "$(nproc)", "--output_dir", "out/run", "--deepspeed", "zero2",
    ]  # fmt: skip
    assert dpo.words[:4] == ["megatron", "rlhf", "--rlhf_type", "dpo"]


def test_comments_and_ends_of_commands() -> None:
    text = "swift sft --a 1 \\\n  # --b 2\necho swift\nswift pt --a 1 \\\n  # no\n  --c 3; swift infer # --d\n"
    assert [found.words for found in find_commands(text)] == [
        ["sft", "--a", "1"],
        ["pt", "--a", "1", "--c", "3"],
        ["infer"],
    ]


def test_settings_in_the_environment_become_flags(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of ms-swift's losses; other variables stay where they are."""
    script = tmp_path / "run.sh"
    script.write_text("INFONCE_TEMPERATURE=0.02 INFONCE_HARD_NEGATIVES=3 NPROC_PER_NODE=2 \\\n"
                      "swift sft --model m --task_type embedding --loss_type infonce --dataset a.jsonl\n")  # fmt: skip
    assert main(["port", str(script)]) == 0
    out = capsys.readouterr().out
    assert "NPROC_PER_NODE=2 swiftlite sft" in out and "INFONCE" not in out
    assert "--infonce_temperature 0.02" in out and "--infonce_hard_negatives 3" in out


def test_a_script_that_runs_unchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.sh").write_text(SCRIPT)
    assert main(["port", "train.sh"]) == 0
    out = capsys.readouterr().out
    assert "NPROC_PER_NODE=2 swiftlite sft --model Qwen/Qwen3-8B" in out and '--system "You are $WHAT"' in out
    assert "| --deepspeed zero2 | acts" in out
    assert "swiftlite megatron rlhf --rlhf_type dpo" in out and out.count("runs unchanged") == 2
    assert [path.name for path in tmp_path.iterdir()] == ["train.sh"], "nothing was run"


@pytest.mark.parametrize(
    "line, said",
    [
        ("swift sft --model A/B --quant_bits 4", "| (together) | refused | --quant_bits 4: trains LoRA alone"),
        (
            "swift sft --model A/B --train_type longlora",
            "| --train_type longlora | refused | --train_type longlora: attention of ms-swift's own",
        ),
        ("swift sft --model A/B --no_such_flag 4", "| --no_such_flag 4 | unknown | leave it out"),
        (
            "swift rlhf --rlhf_type grpo --model A/B",
            "| --rlhf_type grpo | refused | dpo, cpo, simpo, orpo, kto, gkd on the data's answers and reward models (rm)",
        ),
        (
            "swift sft --model A/B --warmup_ratio 0.1 --warmup_steps 3",
            "| (together) | refused | --lr_warmup_fraction and",
        ),
        ("megatron sft --model A/B --fp8_recipe delayed", "| (together) | refused | --fp8_recipe delayed: say which"),
        ("swift app --model A/B", "| app | is not a command here | chat in the terminal"),
    ],
)
def test_what_is_to_be_changed_is_said(
    line: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.sh").write_text(line + "\n")
    assert main(["port", str(tmp_path / "run.sh")]) == 1
    assert said in capsys.readouterr().out


def test_scripts_that_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.sh").write_text("echo swift\n")
    assert main(["port", str(tmp_path / "empty.sh")]) == 2 and "holds no `swift" in capsys.readouterr().err
    assert main(["port", str(tmp_path / "none.sh")]) == 2 and main(["port"]) == 2


def test_arrays_launchers_functions_and_here_documents() -> None:
    text = r"""
ARGS=(
    --lora_rank 8
    # a comment
    --lora_alpha 32  # another
)
ARGS+=(--dataset "my file.jsonl")
swift sft "${ARGS[@]}" --lr ${LR:=1e-4}
torchrun --nproc_per_node 8 --master_port=29501 \
    swift/cli/sft.py --model m
python -m swift.cli.main pt --model m
torchrun --nnodes=2 $(which megatron) sft --model m
python examples/swift/cli.py --model m
swift/cli/_megatron/sft.py
cat <<EOF > config.json
swift sft --no command
EOF
swift() { echo no; }
python /x/swift/cli/_megatron/sft.py --model m
"""
    assert not list(find_commands("python $(which accelerate) launch train.py"))
    (one,) = find_commands("python $(which torchrun) --nproc_per_node 8 swift/cli/sft.py --model m")
    assert one.environment == ["NPROC_PER_NODE=8"] and one.words == ["sft", "--model", "m"]
    found = list(find_commands(text))
    assert [each.words for each in found] == [
        ["sft", "--lora_rank", "8", "--lora_alpha", "32", "--dataset", "my file.jsonl", "--lr", "1e-4"],
        ["sft", "--model", "m"],
        ["pt", "--model", "m"],
        ["megatron", "sft", "--model", "m"],
        ["megatron", "sft", "--model", "m"],
    ]
    assert found[1].environment == ["NPROC_PER_NODE=8", "MASTER_PORT=29501"] and found[3].environment == ["NNODES=2"]


def test_commands_within_commands() -> None:
    """Programs that run others, text for a shell, loops, functions, commands kept in variables, comments in between."""
    text = r"""#!/bin/bash
set -euo pipefail
MODEL=${1:-Qwen/Qwen3-8B}
CMD="swift sft --model $MODEL --dataset a.jsonl"
$CMD --lora_rank 8
eval "$CMD --lora_rank 9"
nohup swift sft --model m1 > log.txt 2>&1 &
srun --nodes=2 torchrun --nnodes 2 --nproc_per_node=8 $(which swift) sft --model m2
uv run swift sft --model m3
conda run -n env swift sft --model m4
docker run --gpus all -it image swift sft --model m5
ssh host "cd /x && swift sft --model m6"
bash -c 'swift sft --model m7'
for lr in 1e-4 1e-5; do
  swift sft --model m8 --lr $lr
done
if [ -f x ]; then swift sft --model m9; else swift pt --model m10; fi
train() {
  swift sft --model m11 "$@"
}
accelerate launch --config_file c.yaml --num_processes 4 swift/cli/sft.py --model m12
deepspeed --num_gpus 4 swift/cli/sft.py --model m13
declare -a OPTS=(--lora_rank 4 --output_dir "out dir")
megatron sft "${OPTS[@]}" --model m14
bash <<'EOF'
swift sft --model m15
EOF
PYTORCH_CUDA_ALLOC_CONF='expandable_segments:True' \
NPROC_PER_NODE=4 \
megatron sft \
    --model m16 \
    # --lora_rank 3 \
    --tensor_model_parallel_size $((2*2))
swift sft --model m17 `# comment` \
   --lr 1e-4
xargs -I{} swift infer --model m18 < list
python3 -u -m torch.distributed.run --nproc_per_node=2 swift/cli/sft.py --model m19
swift sft --model m20 | tee log
timeout 10h swift sft --model m21 && echo done
"""
    found = list(find_commands(text))
    assert [each.line for each in found][:9] == list(range(5, 14)), "of a script in a line, that line"
    models = [each.words[each.words.index("--model") + 1] for each in found]
    assert models == ["Qwen/Qwen3-8B"] * 2 + [f"m{i}" for i in range(1, 22)]
    asked = dict(zip(models, found, strict=True))
    assert asked["Qwen/Qwen3-8B"].words[-2:] == ["--lora_rank", "9"]
    assert asked["m2"].environment == ["NNODES=2", "NPROC_PER_NODE=8"]
    assert asked["m14"].words == ["megatron", "sft", "--lora_rank", "4", "--output_dir", "out dir", "--model", "m14"]
    assert asked["m16"].words[-2:] == ["--tensor_model_parallel_size", "4"] and "--lora_rank" not in asked["m16"].words
    assert asked["m17"].words == ["sft", "--model", "m17", "--lr", "1e-4"]
    assert asked["m8"].words[-1] == "$lr"
    (empty,) = find_commands("swift sft --response_prefix '' --lr 1e-4")
    assert empty.words == ["sft", "--response_prefix", "", "--lr", "1e-4"]


def test_a_script_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["port", "missing.sh"]) == 2
    said = "missing.sh: cannot be read as a script (No such file or directory: missing.sh)"
    assert capsys.readouterr().err == f"swiftlite: error: {said}\n"
