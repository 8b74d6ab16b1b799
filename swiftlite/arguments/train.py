"""Arguments of supervised fine-tuning; TrainArguments is what every trainer on either side shares."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from swiftlite.arguments.base import TunerArguments, normalize_dtype
from swiftlite.arguments.flags import ONLY_TRANSFORMERS, TRAIN_NOTES
from swiftlite.arguments.groups import GroupArguments
from swiftlite.arguments.parser import Arguments, Note, arguments, convert, field, run_setting
from swiftlite.arguments.task import LOSS_TYPES, TASK_LOSSES
from swiftlite.arguments.zero import ZERO, divided
from swiftlite.utils.errors import UsageError
from swiftlite.utils.logger import get_logger

# transformers' names of schedules -> ours. Where a name has settings, this is what their defaults come to.
SCHEDULES_CALLED = {
    "constant_with_warmup": "constant", "cosine_with_min_lr": "cosine", "cosine_with_restarts": "cosine",
    "polynomial": "linear", "inverse_sqrt": "inverse-square-root", "warmup_stable_decay": "WSD",
}  # fmt: skip

# Optimizers of bitsandbytes by transformers' names.
BITSANDBYTES = {
    "adamw_8bit": "AdamW8bit", "adamw_bnb_8bit": "AdamW8bit", "paged_adamw": "PagedAdamW32bit",
    "paged_adamw_32bit": "PagedAdamW32bit", "paged_adamw_8bit": "PagedAdamW8bit",
}  # fmt: skip

OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "adamw", "adam", "muon", *BITSANDBYTES)


@arguments
class TrainArguments(Arguments):
    """Training: batch, schedule, optimizer, saving, logging

    One name serves both sides; transformers' names for the same things are aliases.
    Global batch = micro batch x gradient accumulation x data-parallel size, see `batch_sizes`.
    """

    micro_batch_size: int = run_setting(
        1, "samples of one forward pass on one rank (default: 1, or what the other two leave)",
        aliases=["per_device_train_batch_size"], common=True, least=1,
    )  # fmt: skip
    global_batch_size: int | None = field(None, "samples of one step over all ranks (default 16)", common=True, least=1)
    gradient_accumulation_steps: int | None = run_setting(
        None, "forward passes of one step, instead of a global batch", least=1, common=True
    )
    num_train_epochs: float | None = field(None, "passes over the data", aliases=["max_epochs"], common=True)
    train_iters: int | None = field(None, "steps, instead of epochs", aliases=["max_steps"], common=True, least=1)

    lr: float | None = field(
        None, "highest learning rate (default 1e-5, with LoRA 1e-4)", aliases=["learning_rate"], common=True, least=0
    )
    min_lr: float = field(0, "learning rate at the end", least=0)
    lr_decay_style: str = field(
        "cosine", "shape of the schedule", aliases=["lr_scheduler_type"], common=True,
        choices=["constant", "linear", "cosine", "inverse-square-root", "WSD", *SCHEDULES_CALLED],
    )  # fmt: skip
    lr_scheduler_kwargs: dict[str, float | str] = field(
        {}, 'settings of transformers\' schedules: \'{"min_lr": 1e-6}\' or min_lr_rate with cosine; num_decay_steps, '
        "min_lr_ratio and decay_type with warmup_stable_decay",
    )  # fmt: skip
    lr_wsd_decay_style: str = field(
        "exponential", "shape of the end of --lr_decay_style WSD", choices=["exponential", "linear", "cosine", "minus_sqrt"],
    )  # fmt: skip
    lr_wsd_decay_iters: int | None = field(None, "steps of that end (default: a tenth of the schedule)", least=1)
    lr_decay_iters: int | None = field(None, "steps until --min_lr (default: all)")
    lr_warmup_fraction: float | None = field(
        None, "share of the steps that warm up", aliases=["warmup_ratio"], common=True, least=0, most=1
    )
    lr_warmup_iters: int = field(0, "steps that warm up", aliases=["warmup_steps"], least=0)
    weight_decay: float = field(0.1, "decoupled weight decay", least=0, common=True)
    clip_grad: float = field(1.0, "largest norm of the gradient", aliases=["max_grad_norm"], least=0)
    adam_beta1: float = field(0.9, "Adam's first decay rate")
    adam_beta2: float = field(0.95, "Adam's second decay rate")
    adam_eps: float = field(1e-8, "Adam's epsilon", aliases=["adam_epsilon"])

    optim: str = field(
        "adamw_torch", "AdamW of torch (or of Transformer Engine on Megatron); bitsandbytes' with states of 8 bits, or with "
        "states that move to the host while the GPU is full (paged); muon: torch's Muon for the layers' matrices, AdamW for "
        "the others",
        aliases=["optimizer"], plugins=True, choices=OPTIMIZERS,
        elsewhere={
            "dist_muon": "Megatron-core's own is not built in; use muon with `swiftlite sft`, or adamw_torch",
            "adafactor": "use adamw_torch, or adamw_8bit for states of a quarter of the size",
            "sgd": "use adamw_torch",
        },
    )  # fmt: skip

    fp16: bool = field(False, "same as --torch_dtype float16")
    bf16: bool = field(False, "same as --torch_dtype bfloat16")

    moe_aux_loss_coeff: float = field(
        0.0, "weight of the experts' load-balancing loss, summed over layers", aliases=["router_aux_loss_coef"]
    )
    moe_z_loss_coeff: float | None = field(None, "weight of the routers' z-loss, summed over layers")
    moe_router_load_balancing_type: str | None = field(
        None,
        "over which tokens experts are kept busy: of a micro batch, or of each sequence (default: as the model was trained)",
        choices=["aux_loss", "seq_aux_loss", "sinkhorn", "none"],
    )

    recompute: str | None = run_setting(
        None, "recompute activations to save memory: full, selective or none; sets the three --recompute_* flags",
        aliases=["gradient_checkpointing"], common=True)  # fmt: skip
    save_strategy: str = run_setting(
        "steps",
        "checkpoints every --save_steps, after each epoch, or (no) at the end only",
        choices=["steps", "epoch", "no"],
    )
    save_steps: int = run_setting(500, "steps between checkpoints", aliases=["save_interval"], common=True, least=1)
    save_total_limit: int | None = run_setting(None, "newest checkpoints that are kept, -1: all", common=True, least=-1)
    save_weights_only: bool = run_setting(False, "checkpoints without optimizer and RNG", aliases=["save_only_model"])
    save_safetensors: bool = run_setting(
        False,
        "also write each checkpoint as a Hugging Face directory",
        common=True,
        unavailable={
            "MegatronArguments": None,
            "SftArguments": Note("default", "checkpoints are Hugging Face directories", ("true",)),
        },
    )
    resume: bool = run_setting(True, "resume from the newest finished checkpoint of this run in --output_dir")
    resume_from_checkpoint: str | None = run_setting(
        None, "resume from this checkpoint of the run, or of the same run in another directory (default: --resume's)",
        path=True, common=True,
    )  # fmt: skip
    extend: bool = run_setting(
        False,
        "continue a finished run from its last checkpoint with more epochs or steps, on the schedule of the new length",
    )
    add_version: bool = run_setting(False, "write into a new directory v0-DATE below --output_dir")
    eval_strategy: str | None = run_setting(
        None, "evaluations every --eval_steps, after each epoch, or (no) never (default: as --save_strategy, but not no)",
        aliases=["evaluation_strategy"], choices=["steps", "epoch", "no"],
    )  # fmt: skip
    eval_steps: int | None = run_setting(
        None, "steps between evaluations (default: --save_steps)", aliases=["eval_interval"], common=True, least=1
    )
    eval_iters: int = run_setting(-1, "batches of one evaluation, -1: the whole validation set")
    metric_for_best_model: str = run_setting(
        "loss", "value of an evaluation by which the best checkpoint is chosen and kept", aliases=["best_metric"]
    )
    early_stop_interval: int | None = run_setting(
        None, "end after so many saved checkpoints in a row of which none was the best", least=1,
        aliases=["early_stopping_patience"],
    )  # fmt: skip
    greater_is_better: bool | None = run_setting(None, "is more of it better? (default: unless it is a loss)")
    logging_steps: int = run_setting(5, "steps between log lines", aliases=["log_interval"], common=True, least=1)
    logging_dir: str | None = run_setting(
        None, "TensorBoard files (default: OUTPUT_DIR/runs)", aliases=["tensorboard_dir"], path=True
    )
    report_to: list[str] = run_setting(
        ["tensorboard"], "where metrics go besides logging.jsonl", choices=["tensorboard", "wandb", "swanlab", "none"],
        common=True,
    )  # fmt: skip
    wandb_project: str | None = run_setting(None, "project in wandb or swanlab", aliases=["swanlab_project"])
    wandb_exp_name: str | None = run_setting(
        None, "name of the run there (default: the output directory's)", aliases=["run_name", "swanlab_exp_name"]
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._settle_precision()
        for name in ("moe_aux_loss_coeff", "moe_z_loss_coeff"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise UsageError(f"--{name} {value}: must be a number of 0 or more")
        if self.moe_router_load_balancing_type == "sinkhorn":
            raise UsageError(
                "--moe_router_load_balancing_type sinkhorn: sends tokens to other experts than the model's own choice, so "
                "a trained model computes something else; use aux_loss, seq_aux_loss or none"
            )
        if self.num_train_epochs is not None and self.num_train_epochs <= 0:
            raise UsageError(f"--num_train_epochs {self.num_train_epochs}: must be more than 0")
        self._settle_schedule()
        if self.lr_decay_style == "inverse-square-root" and not (self.lr_warmup_fraction or self.lr_warmup_iters):
            raise UsageError(
                "--lr_decay_style inverse-square-root: falls from the end of the warm-up; give --warmup_ratio"
            )
        if self.save_total_limit == -1:
            self.save_total_limit = None
        if self.lr_warmup_fraction is not None and self.lr_warmup_iters:
            raise UsageError("--lr_warmup_fraction and --lr_warmup_iters: give one of them")
        if str(self.resume_from_checkpoint).lower() in (
            "true",
            "false",
        ):  # transformers' words for the newest, for none
            self.resume_from_checkpoint = None
        if self.resume_from_checkpoint and not self.resume:
            raise UsageError("--resume false and --resume_from_checkpoint: give one of them")
        if self.lr is None:
            self.lr = 1e-5 if getattr(self, "train_type", "full") == "full" else 1e-4
        for name in ("min_lr_rate", "min_lr_ratio"):
            if name in self.lr_scheduler_kwargs:
                self.min_lr = self.lr * convert(self.lr_scheduler_kwargs[name], float, f"lr_scheduler_kwargs {name}")
        if self.min_lr > self.lr:
            raise UsageError(f"--min_lr {self.min_lr}: must not be above --lr {self.lr}")
        if self.recompute is not None:
            by_bool = {"true": "full", "false": "none"}
            self.recompute = by_bool.get(self.recompute.lower(), self.recompute)
            if self.recompute not in ("full", "selective", "none"):
                raise UsageError(f"--recompute {self.recompute}: must be full, selective or none")
        if self.global_batch_size is None and self.gradient_accumulation_steps is None:
            self.global_batch_size = 16
        if self.eval_steps is None:
            self.eval_steps = self.save_steps

    @property
    def trains(self) -> bool:
        return True

    def _settle_schedule(self) -> None:
        """transformers' names of schedules and of their settings become ours."""
        if self.lr_decay_style == "warmup_stable_decay" and "lr_wsd_decay_style" not in self.given:
            self.lr_wsd_decay_style = "cosine"  # transformers' default, which Megatron's name does not say
            self.__dict__["_given"] = self.given | {"lr_wsd_decay_style"}
        self.lr_decay_style = SCHEDULES_CALLED.get(self.lr_decay_style, self.lr_decay_style)
        known = {"cosine": ("min_lr", "min_lr_rate"), "WSD": ("min_lr_ratio", "num_decay_steps", "decay_type")}
        for name, value in self.lr_scheduler_kwargs.items():
            if name not in known.get(self.lr_decay_style, ()):
                others = ", ".join(known.get(self.lr_decay_style, ())) or "none"
                raise UsageError(
                    f"--lr_scheduler_kwargs {name}: --lr_decay_style {self.lr_decay_style} takes {others}; see also "
                    "--min_lr, --lr_decay_iters and --lr_wsd_decay_iters"
                )
            if name == "min_lr":
                self.min_lr = convert(value, float, "lr_scheduler_kwargs min_lr")
            elif name == "num_decay_steps":
                self.lr_wsd_decay_iters = convert(value, int, "lr_scheduler_kwargs num_decay_steps")
            elif name == "decay_type":
                style = "minus_sqrt" if value == "1-sqrt" else str(value)
                if style not in ("linear", "cosine", "minus_sqrt"):
                    raise UsageError(f"--lr_scheduler_kwargs decay_type {value}: must be linear, cosine or 1-sqrt")
                self.lr_wsd_decay_style = style

    def _settle_precision(self) -> None:
        by_flag = {"bfloat16": self.bf16, "float16": self.fp16}
        asked = [dtype for dtype, flag in by_flag.items() if flag]
        if len(asked) == 2 or (asked and self.torch_dtype not in (None, asked[0])):
            raise UsageError(
                f"--bf16 {self.bf16} --fp16 {self.fp16} --torch_dtype {self.torch_dtype}: contradict each other; "
                "give --torch_dtype only"
            )
        self.set_dtype(asked[0] if asked else self.torch_dtype)

    def set_dtype(self, dtype: str | None) -> None:
        """Set torch_dtype, bf16 and fp16 together; float32 sets neither flag."""
        self.torch_dtype = dtype
        self.bf16, self.fp16 = dtype == "bfloat16", dtype == "float16"

    def batch_sizes(self, data_parallel_size: int) -> tuple[int, int, int]:
        """(micro batch, accumulation steps, global batch) for this many data-parallel ranks; two of them decide.

        Raises: UsageError if the sizes that were given do not fit together.
        """
        passes = self.gradient_accumulation_steps
        if self.global_batch_size and passes and "micro_batch_size" not in self.given:
            micro, rest = divmod(self.global_batch_size, passes * data_parallel_size)
            if rest:
                raise UsageError(
                    f"--global_batch_size {self.global_batch_size}: must be a multiple of --gradient_accumulation_steps "
                    f"{passes} x {data_parallel_size} data-parallel ranks"
                )
            return micro, passes, self.global_batch_size
        per_pass = self.micro_batch_size * data_parallel_size
        if self.global_batch_size is None:
            steps = self.gradient_accumulation_steps or 1
            return self.micro_batch_size, steps, per_pass * steps
        if self.global_batch_size % per_pass:
            raise UsageError(
                f"--global_batch_size {self.global_batch_size}: must be a multiple of --micro_batch_size "
                f"{self.micro_batch_size} x {data_parallel_size} data-parallel ranks"
            )
        steps = self.global_batch_size // per_pass
        if self.gradient_accumulation_steps not in (None, steps):
            raise UsageError(
                f"--gradient_accumulation_steps {self.gradient_accumulation_steps}: --global_batch_size "
                f"{self.global_batch_size} over {per_pass} samples at a time makes {steps}; leave one of them out"
            )
        return self.micro_batch_size, steps, self.global_batch_size


@arguments
class SftArguments(TrainArguments, TunerArguments, GroupArguments):
    """Supervised fine-tuning"""

    NOTES: ClassVar[Mapping[str, Note]] = TRAIN_NOTES

    loss_type: str | None = field(
        None, "what is minimised (default: the first of those that --task_type or --rlhf_type has, see docs/objectives.md)",
        aliases=["pref_loss"], choices=LOSS_TYPES, common=True,
    )  # fmt: skip
    use_liger_kernel: bool = run_setting(
        False,
        "liger-kernel's norms, rotary embedding and SwiGLU, where it knows the model",
        aliases=["enable_liger_kernel"],
        unavailable={"MegatronArguments": Note("default", "Transformer Engine's fused kernels do its work")},
    )
    neftune_noise_alpha: float | None = field(None, "noise on the embeddings while training (NEFTune)", least=0)
    enable_dft_loss: bool = field(
        False, "weigh each token's loss by its probability (dynamic fine-tuning)", aliases=["use_dft_loss"],
        unavailable={"DpoArguments": Note("rejected", "belongs to sft and pt")},
    )  # fmt: skip
    token_loss: str | None = field(
        None, "what takes the place of each token's cross entropy: dft (as --enable_dft_loss), or a name that a file of "
        "--external_plugins registers", choices=["dft"], plugins=True,
        unavailable={"DpoArguments": Note("rejected", "belongs to sft and pt")},
    )  # fmt: skip
    enable_channel_loss: bool = run_setting(
        False, "also tell the loss of each group of rows, which they name in a column `channel`: loss_CHANNEL",
        unavailable={"DpoArguments": Note("rejected", "belongs to sft and pt")},
    )  # fmt: skip
    loraplus_lr_ratio: float | None = field(
        None, "learning rate of LoRA's B as a multiple of --lr (LoRA+)", aliases=["lorap_lr_ratio"], least=0,
        unavailable=ONLY_TRANSFORMERS,
    )  # fmt: skip
    quant_method: str | None = field(
        None, "library that quantises the frozen weights of LoRA while they are loaded (QLoRA): bnb, which is bitsandbytes",
        aliases=["quantization_method"], unavailable=ONLY_TRANSFORMERS,
    )  # fmt: skip
    quant_bits: int | None = field(
        None,
        "4 or 8 bits for each weight that LoRA leaves frozen (QLoRA)",
        aliases=["quantization_bit"],
        unavailable=ONLY_TRANSFORMERS,
        common=True,
    )
    bnb_4bit_compute_dtype: str | None = field(
        None, "dtype in which 4-bit weights are multiplied (default: --torch_dtype)", unavailable=ONLY_TRANSFORMERS
    )
    bnb_4bit_quant_type: str = field(
        "nf4", "kind of 4-bit number", choices=["nf4", "fp4"], unavailable=ONLY_TRANSFORMERS
    )
    bnb_4bit_use_double_quant: bool = field(
        True, "quantise the scales of 4-bit weights too", aliases=["double_quantization"], unavailable=ONLY_TRANSFORMERS
    )
    bnb_4bit_quant_storage: str | None = field(
        "uint8", "dtype of the tensors that hold packed 4-bit weights: uint8, or bfloat16, float16, float32, as it is where "
        "FSDP divides them", unavailable=ONLY_TRANSFORMERS,
    )  # fmt: skip
    fsdp: list[str] = run_setting(
        [],
        "full_shard: divide weights, gradients and optimizer over the GPUs (FSDP2), shard_grad_op: but gather each pass's "
        "weights once; `full_shard offload`: in the hosts' memory; or a JSON file of other tools",
        path=True,
        common=True,
        unavailable={
            "MegatronArguments": Note("rejected", "Megatron divides the model by its own flags; see --dry_run")
        },
    )
    fsdp_config: str | None = run_setting(
        None, "JSON file (or JSON) as transformers and accelerate take it: divided as it says, by --fsdp", path=True,
        unavailable={"MegatronArguments": Note("default", "--dry_run shows how Megatron divides")},
    )  # fmt: skip
    deepspeed: str | None = run_setting(
        None,
        "zero0 to zero3, zero2_offload, zero3_offload or a JSON file of DeepSpeed's: divided as its stage says, by --fsdp",
        path=True,
        unavailable={"MegatronArguments": Note("default", "--dry_run shows how Megatron divides", (*ZERO, "none"))},
    )
    sequence_parallel_size: int = run_setting(
        1,
        "ranks that share each sequence (Ulysses): each holds a part of its tokens, and attends with some of the heads",
        least=1,
        unavailable={"MegatronArguments": Note("rejected", "sequences are divided by --context_parallel_size")},
    )
    experts_impl: str | None = run_setting(
        None, "how experts are computed, with transformers 5", choices=["grouped_mm", "batched_mm", "eager"],
        unavailable={
            "MegatronArguments": Note("default", "--moe_grouped_gemm and --moe_grouped_impl say it"),
            "SftArguments": Note("default", "transformers takes grouped products where torch has them", ("grouped_mm",)),
        },
    )  # fmt: skip
    ddp_timeout: int = run_setting(
        1800, "seconds after which an exchange gives up", least=1,
        unavailable={"MegatronArguments": Note("rejected", "give it in minutes with --distributed_timeout_minutes")},
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_train_epochs is None and self.train_iters is None:
            self.num_train_epochs = 1.0
        if self.enable_dft_loss:
            if self.token_loss not in (None, "dft"):
                raise UsageError(f"--token_loss {self.token_loss} with --enable_dft_loss: leave out one of them")
            self.token_loss = "dft"
        if self.loss_type not in (None, *self.loss_types):
            fits = ", ".join(self.loss_types) or "none"
            raise UsageError(f"--loss_type {self.loss_type}: {self.trained_for} has {fits}")
        if self.pools:
            self._check_pooled()
        self.settle_groups(self.loss_type or next(iter(self.loss_types), None))
        self._settle_sharding()
        self._settle_quantisation()
        others = ("moe_aux_loss_coeff", "moe_z_loss_coeff", "neftune_noise_alpha")
        beside = next((name for name in others if getattr(self, name)), None)
        if self.sequence_parallel_size > 1 and beside:
            raise UsageError(
                f"--sequence_parallel_size with --{beside}: it is of whole sequences; leave out one of them"
            )

    @property
    def loss_types(self) -> tuple[str, ...]:
        """Those that fit what is trained, the default first."""
        return TASK_LOSSES[self.task_type or "causal_lm"]

    @property
    def trained_for(self) -> str:
        """In words of a message: what says which losses fit."""
        return f"--task_type {self.task_type or 'causal_lm'}"

    def _check_pooled(self) -> None:
        """What has no meaning where a conversation is read as a whole."""
        if self.truncation_strategy == "split":
            raise UsageError("--truncation_strategy split: one conversation has one label; use delete, left or right")
        asked = {
            "enable_dft_loss": self.enable_dft_loss, "enable_channel_loss": self.enable_channel_loss,
            "token_loss": self.token_loss is not None,
            "loss_scale": "loss_scale" in self.given and self.loss_scale != "default",
            "sequence_parallel_size": self.sequence_parallel_size > 1,
        }  # fmt: skip
        name = next((name for name, is_asked in asked.items() if is_asked), None)
        if name is not None:
            divided = "; `megatron sft --context_parallel_size` divides long texts" if name.startswith("seq") else ""
            raise UsageError(
                f"--{name}: is for the tokens of answers; {self.trained_for} takes one of all; leave it out{divided}"
            )

    def _settle_quantisation(self) -> None:
        """--quant_bits alone means bitsandbytes."""
        self.bnb_4bit_compute_dtype = normalize_dtype(self.bnb_4bit_compute_dtype, "bnb_4bit_compute_dtype")
        if self.bnb_4bit_quant_storage != "uint8":
            self.bnb_4bit_quant_storage = normalize_dtype(self.bnb_4bit_quant_storage, "bnb_4bit_quant_storage")
        if self.quant_method not in (None, "bnb", "bitsandbytes"):
            raise UsageError(
                f"--quant_method {self.quant_method}: weights are quantised for training with bitsandbytes alone, which "
                "needs no data and has 4-bit numbers made for it (NF4); use bnb"
            )
        if self.quant_method and self.quant_bits is None:
            raise UsageError(f"--quant_method {self.quant_method}: give --quant_bits 4 or 8")
        if self.quant_bits is None:
            return
        self.quant_method = "bnb"
        if self.quant_bits not in (4, 8):
            raise UsageError(f"--quant_bits {self.quant_bits}: must be 4 or 8")
        if self.train_type != "lora" or self.begins_with_weights:
            raise UsageError(
                f"--quant_bits {self.quant_bits}: trains LoRA alone, which begins anew; use --train_type lora"
            )
        if self.fsdp:
            raise UsageError(
                f"--quant_bits {self.quant_bits} with --fsdp: packed weights cannot be divided; leave out one"
            )

    def _settle_sharding(self) -> None:
        """--fsdp, or what --deepspeed or files come to, becomes [], or full_shard or shard_grad_op, perhaps offload."""
        division = divided(self.fsdp, self.fsdp_config, self.deepspeed)
        self.fsdp = division.words
        if (division.recomputes or division.offloads) and "recompute" not in self.given:
            self.recompute = "full"
            self.__dict__["_given"] = self.given | {"recompute"}
        if division.offloads:
            now = "are recomputed" if self.recompute == "full" else "stay on the GPU, --recompute full would save them"
            get_logger().info("--fsdp: activations %s, not moved to the host; results are the same", now)
        self._check_sharding()

    def _check_sharding(self) -> None:
        if not self.fsdp:
            return
        if self.optim in (*BITSANDBYTES, "muon") or self.optim not in OPTIMIZERS:
            raise UsageError(f"--fsdp with --optim {self.optim}: its states cannot be divided; use adamw_torch")
        if self.adapts and (self.train_type != "lora" or self.use_dora or self.begins_with_weights):
            raise UsageError(
                "--fsdp: divides plain LoRA alone of all adapters; use --train_type lora, or leave out --fsdp"
            )
        if self.fp16:
            raise UsageError("--fsdp with float16: is not supported; use --torch_dtype bfloat16")
        if self.device_map is not None:
            raise UsageError("--fsdp with --device_map: both say where layers are; leave out one")


@arguments
class PtArguments(SftArguments):
    """Continued pre-training: rows with `text`, ended by the end token, packed, trained on as a whole"""

    def __post_init__(self) -> None:
        defaults = {
            "use_chat_template": False, "loss_scale": "all", "packing": True, "truncation_strategy": "split",
            "max_length": 2048,
        }  # fmt: skip
        for name, value in defaults.items():
            if name not in self.given:
                setattr(self, name, value)
        if self.packing and self.group_by_length and "packing" not in self.given:
            self.packing = False
        super().__post_init__()
