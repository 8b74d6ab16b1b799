"""The record of ms-swift's flow: what its `parse_to_megatron` starts a Megatron-LM process with, for the same model.

No command of swiftlite uses it: it is kept for those who compare the two, and held to recordings by tests.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from swiftlite.arguments.bridge import Row, fixed, off, same
from swiftlite.arguments.description import Described
from swiftlite.utils.types import Json

if TYPE_CHECKING:
    from swiftlite.arguments.parallel import MegatronArguments

ARGV: tuple[Row, ...] = (
    # batch, recomputation, fusions
    *same("--micro-batch-size"),
    Row("--global-batch-size", "global_batch_size", fallback=16),
    *same("--recompute-granularity", "--recompute-method", "--recompute-num-layers", "--recompute-modules"),
    *same("--use-cpu-initialization", "--deterministic-mode", "--train-iters"),
    Row("--log-interval", "logging_steps"),
    Row("--tensorboard-dir", "logging_dir"),
    off("--no-masked-softmax-fusion", "masked_softmax_fusion"),
    off("--no-bias-dropout-fusion", "bias_dropout_fusion"),
    off("--no-bias-swiglu-fusion", "bias_swiglu_fusion"),
    off("--no-rope-fusion", "apply_rope_fusion"),
    off("--no-gradient-accumulation-fusion", "gradient_accumulation_fusion"),
    *same("--cross-entropy-loss-fusion", "--cross-entropy-fusion-impl", "--calculate-per-token-loss"),
    Row("--attention-backend", "attention_backend", fallback="flash"),
    # optimizer and schedule
    fixed("--optimizer", "adam"),
    *same("--optimizer-cpu-offload", "--optimizer-offload-fraction", "--use-precision-aware-optimizer"),
    fixed("--main-grads-dtype", "fp32"),
    fixed("--main-params-dtype", "fp32"),
    fixed("--exp-avg-dtype", "fp32"),
    fixed("--exp-avg-sq-dtype", "fp32"),
    fixed("--dataloader-type", "cyclic"),
    fixed("--manual-gc-interval", 0),
    *same("--lr", "--lr-decay-style", "--lr-decay-iters", "--lr-warmup-iters", "--lr-warmup-fraction", "--min-lr"),
    *same("--weight-decay", "--clip-grad", "--adam-beta1", "--adam-beta2", "--adam-eps"),
    fixed("--sgd-momentum", 0.9),
    # checkpoints
    Row("--save", "output_dir"),
    Row("--save-interval", "save_steps"),
    *same("--no-save-optim", "--no-save-rng"),
    Row("--load", "mcore_model"),
    *same("--no-load-optim", "--no-load-rng"),
    fixed("--ckpt-format", "torch_dist"),
    fixed("--no-initialization", True),
    fixed("--auto-detect-ckpt-format", True),
    fixed("--exit-on-missing-checkpoint", True),
    # parallelism
    fixed("--distributed-backend", "nccl"),
    fixed("--local-rank", 0),
    fixed("--use-distributed-optimizer", True),
    *same("--tensor-model-parallel-size", "--pipeline-model-parallel-size"),
    *same("--decoder-first-pipeline-num-layers", "--decoder-last-pipeline-num-layers"),
    *same("--sequence-parallel", "--context-parallel-size", "--tp-comm-overlap"),
    *same("--overlap-grad-reduce", "--overlap-param-gather", "--distributed-timeout-minutes"),
    *same("--num-virtual-stages-per-pipeline-rank"),
    # model
    *same("--num-layers", "--hidden-size", "--ffn-hidden-size", "--num-attention-heads"),
    Row("--group-query-attention", rule=lambda args: (args.num_query_groups or 1) > 1),
    *same("--num-query-groups", "--max-position-embeddings"),
    fixed("--position-embedding-type", "rope"),
    *same("--rotary-base"),
    fixed("--rotary-percent", 1.0),
    *same("--rotary-interleaved"),
    fixed("--normalization", "RMSNorm"),
    *same("--norm-epsilon", "--swiglu", "--untie-embeddings-and-output-weights", "--disable-bias-linear"),
    *same("--add-qkv-bias", "--attention-dropout", "--hidden-dropout", "--kv-channels", "--qk-layernorm"),
    fixed("--transformer-impl", "transformer_engine"),
    *same("--mtp-num-layers"),
    # experts
    *same("--num-experts", "--moe-layer-freq", "--moe-ffn-hidden-size", "--moe-shared-expert-intermediate-size"),
    *same("--moe-router-topk", "--moe-router-pre-softmax", "--moe-router-dtype", "--moe-router-score-function"),
    *same("--moe-router-num-groups", "--moe-router-group-topk"),
    *same("--moe-router-bias-update-rate", "--moe-router-enable-expert-bias", "--moe-router-topk-scaling-factor"),
    *same("--moe-router-load-balancing-type", "--expert-model-parallel-size", "--expert-tensor-parallel-size"),
    *same("--moe-token-dispatcher-type", "--moe-grouped-gemm", "--moe-permute-fusion"),
    *same("--moe-aux-loss-coeff", "--moe-z-loss-coeff", "--moe-shared-expert-overlap"),
    *same("--moe-expert-capacity-factor", "--moe-pad-expert-input-to-capacity", "--moe-token-drop-policy"),
    # latent attention
    *same("--multi-latent-attention", "--q-lora-rank", "--kv-lora-rank", "--qk-head-dim", "--qk-pos-emb-head-dim"),
    *same("--v-head-dim"),
    # precision
    *same("--fp8-format", "--fp8-recipe"),
    fixed("--fp8-amax-history-len", 1024),
    fixed("--fp8-amax-compute-algo", "max"),
    *same("--fp8-param-gather", "--fp16", "--bf16", "--apply-query-key-layer-scaling", "--attention-softmax-in-fp32"),
    # logging, evaluation, the rest
    fixed("--tensorboard-log-interval", 1),
    fixed("--tensorboard-queue-size", 50),
    fixed("--log-timers-to-tensorboard", True),
    fixed("--log-validation-ppl-to-tensorboard", True),
    fixed("--log-memory-to-tensorboard", True),
    *same("--wandb-project", "--wandb-exp-name", "--eval-iters"),
    Row("--eval-interval", "eval_steps"),
    *same("--seed", "--seq-length"),
    fixed("--num-workers", 4),
)

# What Megatron-LM has no flag for. Values are kept as they are: None, False and the dtype object included.
EXTRA: tuple[Row, ...] = (
    Row("train_type", "train_type"),
    Row("freeze_parameters", "freeze_parameters"),
    Row("freeze_parameters_regex", "freeze_parameters_regex"),
    Row("freeze_parameters_ratio", "freeze_parameters_ratio"),
    Row("trainable_parameters", "trainable_parameters"),
    Row("trainable_parameters_regex", "trainable_parameters_regex"),
    Row("adapter_load", "mcore_adapter"),
    Row("target_modules", "target_modules"),
    Row("target_regex", "target_regex"),
    Row("modules_to_save", "modules_to_save"),
    Row("lora_rank", "lora_rank"),
    Row("lora_alpha", "lora_alpha"),
    Row("lora_dropout", "lora_dropout"),
    Row("lora_bias", "lora_bias"),
    Row("lora_dtype", "lora_dtype"),
    Row("use_rslora", "use_rslora"),
    Row("ref_load", "mcore_ref_model"),
    Row("beta", "beta", fallback=0.1),
    Row("rpo_alpha", "rpo_alpha"),
    Row("reference_free", "reference_free", fallback=False),
    Row("label_smoothing", "label_smoothing", fallback=0.0),
    Row("f_divergence_type", "f_divergence_type", fallback="reverse_kl"),
    Row("loss_type", "loss_type", fallback="sigmoid"),
    Row("padded_vocab_size", "padded_vocab_size"),
    fixed("initialize_embedding", False),
    Row("rope_scaling", "rope_scaling"),
    Row("torch_dtype", "dtype"),
    Row("padding_free", "padding_free", fallback=True),
    fixed("mlp_padding_free", False),
    fixed("dataloader_persistent_workers", True),
    fixed("dataloader_prefetch_factor", 10),
    Row("architectures", "architectures"),
    Row("max_epochs", "num_train_epochs"),
    fixed("enable_dft_loss", False),
    Row("original_max_position_embeddings", "original_max_position_embeddings"),
    Row("partial_rotary_factor", "partial_rotary_factor"),
    Row("use_shared_expert_gate", "use_shared_expert_gate"),
)


def parse_to_megatron(args: MegatronArguments) -> tuple[list[str], Json]:
    """(argv, extra_args): Megatron-LM's arguments as strings, and the settings it has no flag for.

    Like ms-swift's, `--rotary-percent` is 1.0 for every model: partial rotation is `partial_rotary_factor` in the
    extra arguments, applied by replacing the rotary frequencies. For stock Megatron-LM use `megatron_lm_args`.
    Raises: ConfigError before the model's config is applied.
    """
    both = Described(args.description, args)
    argv = [word for row in ARGV for word in row.words(both)]
    return argv, {row.flag: row.value(both) for row in EXTRA}
