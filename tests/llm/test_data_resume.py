"""A run that was stopped sees exactly the remaining samples: map-style, streamed, packed, on both sides."""

from __future__ import annotations

import json

import pytest

from swiftlite.cli.main import main

ROWS = [
    {"messages": [{"role": "user", "content": f"What is {i} plus {i}?"},
                  {"role": "assistant", "content": f"It is {2 * i}. " + "Paris. " * (i % 5)}]}
    for i in range(40)
]  # fmt: skip
WAYS = {
    "grouped": ["--group_by_length", "true"],
    "packed": ["--packing", "true"],
    "streamed": ["--streaming", "true", "--shuffle_buffer_size", "8"],
    "streamed-packed": ["--streaming", "true", "--shuffle_buffer_size", "12", "--packing", "true"],
}
STOP, STEPS = 4, 7


class Stopped(Exception):
    pass


@pytest.fixture
def run(tiny_model, tmp_path, monkeypatch):
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))

    def train(command, output, extra, stop=None, refused=False):
        words = [*command.split(), "--model", str(tiny_model("qwen3")), "--model_type", "qwen3", "--dataset", str(data),
                 "--train_iters", str(STEPS), "--global_batch_size", "2", "--micro_batch_size", "1", "--max_length",
                 "120", "--torch_dtype", "float32", "--lr", "1e-3", "--logging_steps", "1", "--save_steps", "2",
                 "--output_dir", str(tmp_path / output), *extra]  # fmt: skip
        with monkeypatch.context() as patch:
            if stop:
                _stop_at(stop, patch)
            code = main(words)
        assert code == (1 if stop else 2 if refused else 0)
        lines = [json.loads(line) for line in (tmp_path / output / "logging.jsonl").read_text().splitlines()]
        return [(line["step"], line["loss"]) for line in lines if "loss" in line]

    return train


def _stop_at(step, patch):
    from swiftlite.train.metrics import Metrics

    original = Metrics.advance

    def advance(self, now, *args, **kwargs):
        original(self, now, *args, **kwargs)
        if now > step:
            raise Stopped

    patch.setattr(Metrics, "advance", advance)


# The rest runs with `make test-slow`.
QUICK = {
    ("sft", "grouped"),
    ("sft", "streamed-packed"),
    ("megatron sft", "packed"),
    ("megatron sft", "streamed-packed"),
}


@pytest.mark.parametrize(
    ("command", "way"),
    [
        pytest.param(command, way, marks=[] if (command, way) in QUICK else [pytest.mark.slow])
        for command in ("sft", "megatron sft")
        for way in WAYS
    ],
)
def test_resumed_equals_uninterrupted(run, command, way, tmp_path, capsys):
    if command.startswith("megatron"):
        pytest.importorskip("megatron.core")
    whole = run(command, "whole", WAYS[way])
    assert [step for step, _ in whole] == list(range(1, STEPS + 1))
    run(command, "cut", WAYS[way], stop=STOP)
    if "streamed" in way:
        data = tmp_path / "data.jsonl"
        before = data.read_text()
        data.write_text(before.replace("What is 39", "What is 93"))
        assert run(command, "cut", WAYS[way], refused=True)
        assert "the training data has changed since" in capsys.readouterr().err
        data.write_text(before)
    # Another number of encoding processes does not matter.
    assert run(command, "cut", [*WAYS[way], "--dataset_num_proc", "2"]) == whole
    assert len({loss for _, loss in whole}) == STEPS, "different samples in each step"


def test_streaming_needs_a_number_of_steps(tiny_model, tmp_path, capsys):
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps(ROWS[0]) + "\n")
    words = ["--model", str(tiny_model("qwen3")), "--model_type", "qwen3", "--dataset", str(data), "--output_dir",
             str(tmp_path / "x")]  # fmt: skip
    for command in ("sft", "megatron sft"):
        assert main([*command.split(), *words, "--streaming", "true"]) == 2
        assert "give --train_iters" in capsys.readouterr().err
        assert main([*command.split(), *words, "--streaming", "true", "--split_dataset_ratio", "0.1"]) == 2
        assert "a stream cannot be split" in capsys.readouterr().err
        assert main([*command.split(), *words, "--packing", "true", "--packing_length", "10"]) == 2
        assert "sequences of 10 tokens must hold samples of --max_length" in capsys.readouterr().err
