"""Models that classify and reward models: trained as transformers' Trainer and trl's RewardTrainer do, saved for both."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from swiftlite.arguments.task import PROBLEMS
from swiftlite.cli.export import export_main
from swiftlite.llm.dataset.pairs import PairDataset
from swiftlite.llm.dataset.preprocess import preprocess
from swiftlite.llm.infer import infer_main
from swiftlite.llm.model.heads import prepare_head
from swiftlite.llm.template import get_template
from swiftlite.llm.train.rlhf import rlhf_main
from swiftlite.llm.train.sft import sft_main
from swiftlite.train.plot import read_run
from swiftlite.train.schedule import build_optimizer
from swiftlite.utils.errors import UsageError
from tests.rows import preference_rows

STEPS, BATCH, RATE = 20, 4, 1e-3
TEXTS = [f"{'good' if i % 3 else 'bad'} film {i} " * (i % 4 + 1) for i in range(12)]
LABELS: dict[str, tuple[int, Callable[[int], object]]] = {
    PROBLEMS[0]: (3, lambda i: i % 3),
    PROBLEMS[1]: (4, lambda i: [c for c in range(4) if (i + c) % 3 == 0]),
    PROBLEMS[2]: (1, lambda i: i % 5 / 2 - 1),
}
RUN = {"train_iters": STEPS, "global_batch_size": BATCH, "micro_batch_size": 2, "lr": RATE, "lr_decay_style": "constant",
       "logging_steps": 1, "save_strategy": "no", "torch_dtype": "float32", "dataset_shuffle": "false",
       "adam_eps": 1e-5}  # fmt: skip


def words(**flags: object) -> list[str]:
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def optimizer_of(model: Any) -> Any:
    adam = {"adam_beta1": 0.9, "adam_beta2": 0.95, "adam_eps": 1e-5, "optim": "adamw_torch", "loraplus_lr_ratio": None}
    settings: Any = SimpleNamespace(weight_decay=0.1, lr=RATE, **adam)
    return build_optimizer(model, settings)


def logged(directory: Path, name: str = "loss") -> list[float]:
    return [line[name] for line in read_run(directory / "logging.jsonl") if "loss" in line]


class InOrder:
    """A trainer that takes rows as they stand."""

    def _get_train_sampler(self, *_: Any) -> Any:
        return [step % len(TEXTS) for step in range(STEPS * BATCH)]


def hf_args(kind: Any, output: Path, **more: Any) -> Any:
    return kind(
        output_dir=str(output), max_steps=STEPS, lr_scheduler_type="constant", max_grad_norm=1.0, logging_steps=1,
        save_strategy="no", report_to=[], use_cpu=True, bf16=False, disable_tqdm=True, learning_rate=RATE,
        per_device_train_batch_size=BATCH, **more,
    )  # fmt: skip


@pytest.mark.parametrize("problem", PROBLEMS)
def test_classifier_trains_as_with_transformers(problem: str, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """20 steps, full training, plain text: the same losses as transformers.Trainer; the result loads bit-equal there."""
    base, (count, label) = tiny_model("qwen3"), LABELS[problem]
    data = write(tmp_path / "rows.jsonl", [{"text": t, "label": label(i)} for i, t in enumerate(TEXTS)])
    # A kind that is not said is that of the first row.
    output = tmp_path / "out"
    sft_main(words(model=base, dataset=data, task_type="seq_cls", num_labels=count, use_chat_template="false",
                   output_dir=output, **RUN))  # fmt: skip
    saved = output / f"checkpoint-{STEPS}"

    # The same start: the head is that of our seed.
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=count, problem_type=problem, dtype=torch.float32
    )
    from swiftlite.weights.head import initial_head

    model.score.weight.data.copy_(initial_head(count, model.config.hidden_size, model.config.initializer_range, 42))
    model.config.pad_token_id = tokenizer.pad_token_id
    rows = []
    for i, text in enumerate(TEXTS):
        value: Any = label(i)
        if problem == PROBLEMS[1]:
            value = [float(c in value) for c in range(count)]
        rows.append({"input_ids": tokenizer(text, add_special_tokens=False)["input_ids"], "labels": value})

    class Trainer(InOrder, transformers.Trainer):
        pass

    optimizer = optimizer_of(model)
    trainer = Trainer(
        model=model, args=hf_args(transformers.TrainingArguments, tmp_path / "hf"), train_dataset=rows,  # type: ignore[arg-type]
        data_collator=transformers.DataCollatorWithPadding(tokenizer),
        optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)),
    )  # fmt: skip
    trainer.train()
    theirs = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert logged(output) == pytest.approx(theirs, abs=1e-5)
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(saved, dtype=torch.float32)
    assert (loaded.config.num_labels, loaded.config.problem_type) == (count, problem)
    assert type(loaded).__name__ == "Qwen3ForSequenceClassification"
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], tensor, rtol=0, atol=2e-5, msg=name)


def test_reward_model_trains_as_with_trl(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    base = tiny_model("qwen3")
    found = preference_rows(12)
    data = write(tmp_path / "rows.jsonl", found)
    output = tmp_path / "out"
    rlhf_main(words(model=base, dataset=data, rlhf_type="rm", center_rewards_coefficient=0.05, template="qwen3",
                   output_dir=output, **RUN))  # fmt: skip
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    pairs = PairDataset([preprocess(row) for row in found], get_template("qwen3", tokenizer))
    rows = [
        {f"{side}_ids": list(pairs.pair(i)[side]["input_ids"]) for side in ("chosen", "rejected")} for i in range(12)
    ]

    class Trainer(InOrder, trl.RewardTrainer):  # type: ignore[misc,name-defined]
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

    model = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32)
    from swiftlite.weights.head import initial_head

    model.score.weight.data.copy_(initial_head(1, model.config.hidden_size, model.config.initializer_range, 42))
    model.config.pad_token_id = tokenizer.pad_token_id
    optimizer = optimizer_of(model)
    args = hf_args(
        trl.RewardConfig, tmp_path / "trl", center_rewards_coefficient=0.05, gradient_checkpointing=False,
        disable_dropout=False,
    )  # fmt: skip
    trainer = Trainer(
        model=model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
        optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)),
    )  # fmt: skip
    trainer.train()
    theirs = [line for line in trainer.state.log_history if "loss" in line]
    assert logged(output) == pytest.approx([line["loss"] for line in theirs], abs=1e-5)
    assert logged(output, "rewards/margins") == pytest.approx([line["margin"] for line in theirs], abs=1e-5)
    assert logged(output, "rewards/accuracies") == pytest.approx([line["accuracy"] for line in theirs])


def answers(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_lora_classifier_answers_in_peft_in_infer_and_merged(
    tiny_model: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The head is trained and saved beside LoRA. Rows with bad labels are dropped and told."""
    peft = pytest.importorskip("peft")
    base = tiny_model("qwen3")
    rows: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": t}], "label": i % 3} for i, t in enumerate(TEXTS)
    ]
    data = write(tmp_path / "rows.jsonl", [*rows, {"text": "x", "label": 3}])
    output, common = tmp_path / "out", {**RUN, "train_iters": 4, "lr": 1e-2}
    flags = {"model": base, "dataset": data, "task_type": "seq_cls", "num_labels": 3, "template": "qwen3",
             "train_type": "lora", "lora_dropout": 0.0, "max_drop_ratio": 0.5}  # fmt: skip
    sft_main(words(**flags, output_dir=output, **common))
    (rejected,) = answers(output / "rejects.jsonl")
    assert rejected["reason"] == "label out of range" and rejected["row"]["label"] == 3
    adapter = output / "checkpoint-4"
    stated = json.loads((adapter / "adapter_config.json").read_text())
    assert stated["task_type"] == "SEQ_CLS" and "score" in stated["modules_to_save"]

    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=3, dtype=torch.float32)
    model.config.pad_token_id = tokenizer.pad_token_id
    model = peft.PeftModel.from_pretrained(model, adapter).eval()
    template = get_template("qwen3", tokenizer)
    prompts = [template.render(row["messages"], add_generation_prompt=True) for row in rows]
    batch = tokenizer(prompts, add_special_tokens=False, padding=True, return_tensors="pt")
    with torch.no_grad():
        wanted = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits

    def infer(*more: str) -> list[dict[str, Any]]:
        results = tmp_path / f"{more[0][2:]}.jsonl"
        infer_main([*more, *words(val_dataset=write(tmp_path / "val.jsonl", rows), result_path=results,
                                  max_batch_size=5, torch_dtype="float32")])  # fmt: skip
        return answers(results)

    merged = tmp_path / "merged"
    export_main(words(adapters=adapter, merge_lora="true", output_dir=merged, torch_dtype="float32"))
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(merged, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).logits, wanted, rtol=1e-4, atol=1e-5)
    for found in (infer("--adapters", str(adapter)), infer("--model", str(merged))):
        torch.testing.assert_close(torch.tensor([row["logits"] for row in found]), wanted, rtol=1e-4, atol=1e-5)
        assert [row["response"] for row in found] == wanted.argmax(-1).tolist()
        assert [row["labels"] for row in found] == [row["label"] for row in rows]
    right = (wanted.argmax(-1) == torch.tensor([row["label"] for row in rows])).float().mean()
    assert f"accuracy {float(right):.4f}" in caplog.text


def test_packed_samples_are_classified_as_padded_ones(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """Padding on either side, joined rows, packing and a stream: the same labels meet the same tokens."""
    base = tiny_model("qwen3")
    rows: list[dict[str, Any]] = [{"text": t, "label": i % 3} for i, t in enumerate(TEXTS)]
    data = write(tmp_path / "rows.jsonl", rows)
    common = {**RUN, "train_iters": 2, "model": base, "task_type": "seq_cls", "num_labels": 3, "dataset": data}
    ways = {
        "padded": {}, "left": {"padding_side": "left"}, "joined": {"padding_free": "true"},
        "streamed": {"streaming": "true"},
    }  # fmt: skip
    found = {}
    for name, flags in ways.items():
        sft_main(words(**common, use_chat_template="false", output_dir=tmp_path / name, **flags))
        found[name] = logged(tmp_path / name)
    for name in ways:
        assert found[name] == pytest.approx(found["padded"], abs=1e-5), name
    packed = {"packing": "true", "max_length": 250, "global_batch_size": 1, "micro_batch_size": 1, "train_iters": 1}
    whole = {"global_batch_size": 12, "micro_batch_size": 4, "train_iters": 1}
    for name, flags in (("packed", packed), ("whole", whole)):
        sft_main(words(**{**common, **flags}, use_chat_template="false", output_dir=tmp_path / name))
    assert len(read_run(tmp_path / "packed" / "logging.jsonl")) > 0


def test_a_run_that_resumes_ends_as_one_that_did_not(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    base = tiny_model("qwen3")
    data = write(tmp_path / "rows.jsonl", [{"text": t, "label": i % 3} for i, t in enumerate(TEXTS)])
    common = {**RUN, "train_iters": 4, "save_strategy": "steps", "save_steps": 2, "model": base, "dataset": data,
              "task_type": "seq_cls", "num_labels": 3, "use_chat_template": "false"}  # fmt: skip
    sft_main(words(**common, output_dir=tmp_path / "one"))
    sft_main(words(**common, output_dir=tmp_path / "two"))
    shutil.rmtree(tmp_path / "two" / "checkpoint-4")
    sft_main(words(**common, output_dir=tmp_path / "two"))
    one, two = ((tmp_path / name / "checkpoint-4" / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two
    with pytest.raises(UsageError, match=r"--num_labels 2: the head in .* has 3"):
        sft_main(
            words(**{**common, "model": tmp_path / "one" / "checkpoint-4", "num_labels": 2}, output_dir=tmp_path / "x")
        )


def test_encoders_are_refused() -> None:
    """Their heads read the first token."""
    config = transformers.BertConfig(
        vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    model = transformers.BertForSequenceClassification(config)
    with pytest.raises(UsageError, match="BertForSequenceClassification has no layer `score` of last tokens"):
        prepare_head(model, None, SimpleNamespace(model_info=SimpleNamespace(config={})))  # type: ignore[arg-type]
