"""The commands: which arguments they read, which function runs them, whether torchrun may start them. Data only."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Route:
    """`arguments` and `handler` are `module:name`, imported when the command runs.

    launch: may torchrun start it? example: a whole command line, which `--help` shows.
    """

    arguments: str
    handler: str
    launch: bool
    help: str
    example: str = ""


_EXPORT = Route(
    "swiftlite.arguments.export:ExportArguments",
    "swiftlite.cli.export:export_main",
    True,
    "convert Hugging Face <-> Megatron-core checkpoints",
    "swiftlite export --model Qwen/Qwen3-0.6B --to_mcore true --output_dir Qwen3-0.6B-mcore --test_convert_precision true",
)

_DPO = Route(
    "swiftlite.arguments.preference:DpoArguments",
    "swiftlite.llm.train.rlhf:rlhf_main",
    True,
    "training on preferences (pairs; with --rlhf_type kto labelled answers) with transformers, full or LoRA",
    "swiftlite dpo --model Qwen/Qwen3-0.6B --dataset pairs.jsonl --train_type lora --lr 5e-6 --output_dir dpo",
)

_MEGATRON_DPO = Route(
    "swiftlite.arguments.megatron_preference:MegatronDpoArguments",
    "swiftlite.megatron.trainers.rlhf:megatron_rlhf_main",
    True,
    "training on preferences (pairs; with --rlhf_type kto labelled answers) on megatron-core",
    "NPROC_PER_NODE=8 swiftlite megatron dpo --mcore_model MCORE_DIR --dataset pairs.jsonl --beta 0.1 --output_dir dpo",
)

ROUTES: dict[tuple[str, ...], Route] = {
    ("sft",): Route(
        "swiftlite.arguments.train:SftArguments",
        "swiftlite.llm.train.sft:sft_main",
        True,
        "supervised fine-tuning with transformers, full or LoRA",
        "swiftlite sft --model Qwen/Qwen3-0.6B --dataset train.jsonl --train_type lora --output_dir run",
    ),
    ("pt",): Route(
        "swiftlite.arguments.train:PtArguments",
        "swiftlite.llm.train.sft:pt_main",
        True,
        "continued pre-training on plain text with transformers",
        "swiftlite pt --model Qwen/Qwen3-0.6B-Base --dataset text.jsonl --max_length 4096 --packing true --output_dir run",
    ),
    ("dpo",): _DPO,
    ("rlhf",): _DPO,
    ("megatron", "sft"): Route(
        "swiftlite.arguments.megatron_train:MegatronSftArguments",
        "swiftlite.megatron.trainers.sft:megatron_sft_main",
        True,
        "supervised fine-tuning on megatron-core",
        "NPROC_PER_NODE=8 swiftlite megatron sft --model HF_DIR --dataset train.jsonl --expert_model_parallel_size 8 "
        "--output_dir run",
    ),
    ("megatron", "pt"): Route(
        "swiftlite.arguments.megatron_train:MegatronPtArguments",
        "swiftlite.megatron.trainers.sft:megatron_pt_main",
        True,
        "continued pre-training on plain text on megatron-core",
        "NPROC_PER_NODE=8 swiftlite megatron pt --model HF_DIR --dataset text.jsonl --max_length 4096 --output_dir run",
    ),
    ("megatron", "dpo"): _MEGATRON_DPO,
    ("megatron", "rlhf"): _MEGATRON_DPO,
    ("infer",): Route(
        "swiftlite.arguments.infer:InferArguments",
        "swiftlite.llm.infer:infer_main",
        False,
        "chat with a model, or answer a dataset",
        "swiftlite infer --model Qwen/Qwen3-0.6B --adapters run/checkpoint-100 --prompt 'Who are you?'",
    ),
    ("eval",): Route(
        "swiftlite.arguments.evaluate:EvalArguments",
        "swiftlite.cli.evaluate:eval_main",
        False,
        "loss, perplexity, scores of answers and benchmarks of models, side by side",
        "swiftlite eval --model Qwen/Qwen3-0.6B run/checkpoint-100 --val_dataset test.jsonl --metrics loss rouge",
    ),
    ("deploy",): Route(
        "swiftlite.arguments.deploy:DeployArguments",
        "swiftlite.cli.deploy:deploy_main",
        False,
        "serve a model under OpenAI's API with vLLM, SGLang or transformers",
        "swiftlite deploy --model Qwen/Qwen3-0.6B --adapters run/checkpoint-100 --infer_backend vllm --port 8000",
    ),
    ("export",): _EXPORT,
    ("megatron", "export"): _EXPORT,
    ("verify",): Route(
        "swiftlite.arguments.export:VerifyArguments",
        "swiftlite.convert.compare:verify_main",
        False,
        "compare two checkpoints of either format, tensor by tensor",
        "swiftlite verify Qwen3-0.6B Qwen3-0.6B-mcore",
    ),
    ("check",): Route(
        "swiftlite.arguments.export:CheckArguments",
        "swiftlite.selftest.check:check_main",
        False,
        "self-test a model type: shrink it, convert it both ways, compare logits",
        "swiftlite check --model Qwen/Qwen3-0.6B",
    ),
    ("preview",): Route(
        "swiftlite.arguments.preview:PreviewArguments",
        "swiftlite.llm.preview:preview_main",
        False,
        "show rows as the model will see them: tokens, loss, dropped rows, lengths, packing",
        "swiftlite preview --model Qwen/Qwen3-0.6B --dataset train.jsonl --num_rows 5 --html report.html",
    ),
    ("plot",): Route(
        "swiftlite.arguments.plot:PlotArguments",
        "swiftlite.train.plot:plot_main",
        False,
        "curves of training runs in one picture",
        "swiftlite plot run other-run --output runs.png --html runs.html",
    ),
    ("env",): Route(
        "swiftlite.arguments.env:EnvArguments",
        "swiftlite.selftest.environment:env_main",
        False,
        "what is installed, what a run here uses and why, what is missing for which command",
        "swiftlite env --json true",
    ),
    ("port",): Route(
        "swiftlite.arguments.port:PortArguments",
        "swiftlite.cli.port:port_main",
        False,
        "what the swift and megatron commands of a shell script come to here, flag by flag",
        "swiftlite port train.sh",
    ),
    ("completion",): Route(
        "swiftlite.arguments.completion:CompletionArguments",
        "swiftlite.cli.completion:completion_main",
        False,
        "a script that lets bash, zsh or fish complete commands, flags and values",
        'eval "$(swiftlite completion bash)"',
    ),
}

# Commands of ms-swift that are none here -> what does their work.
ELSEWHERE = {
    "app": "chat in the terminal with `swiftlite infer --model DIR`; a web page: any that talks to `swiftlite deploy`",
    "web-ui": "write a config file and give it to a command: `swiftlite sft run.yaml`",
    "rollout": "models are not trained on their own answers here; GRPO: TRL, verl or ms-swift on the Hugging Face directory",
    "sample": "answer a dataset with `swiftlite infer --val_dataset FILE --result_path OUT.jsonl`",
    "merge-lora": "`swiftlite export --adapters DIR --merge_lora true`",
}
