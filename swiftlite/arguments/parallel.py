"""MegatronArguments: settings under Megatron-LM's own names. Imports neither torch nor megatron-core.

A bare MegatronArguments says how a model is run; with SftArguments it makes a training command. The model itself is a
ModelDescription, which `apply_model_config` makes of the Hugging Face config.
"""

from __future__ import annotations

import importlib.util
from typing import ClassVar

from swiftlite.arguments.base import RunArguments, TunerArguments
from swiftlite.arguments.description import OVERRIDES, ModelDescription
from swiftlite.arguments.export import McoreArguments
from swiftlite.arguments.flags import AVERAGED_PAIRS, BF16_WEIGHTS, NO_MTP
from swiftlite.arguments.parser import Arguments, arguments, field, run_setting, specs
from swiftlite.arguments.pipeline import chunk_layers, layout_chunks
from swiftlite.arguments.train import TrainArguments
from swiftlite.utils.errors import ConfigError, UsageError
from swiftlite.utils.logger import get_logger
from swiftlite.utils.types import Config, Json

OFFLOADED = ("attn_norm", "qkv_linear", "core_attn", "attn_proj", "mlp_norm", "expert_fc1", "moe_act")
MOMENT_DTYPES = ("fp32", "bf16", "fp16", "fp8")
# Fields that say in which dtype the optimizer keeps what.
OPTIMIZER_DTYPES = ("main_grads_dtype", "main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype")


@arguments
class ParallelArguments(Arguments):
    """Parallelism: how the model and the batch are divided"""

    RESUME: ClassVar[str] = "may change"

    tensor_model_parallel_size: int = field(1, "ranks that share each layer (TP)", common=True)
    pipeline_model_parallel_size: int = field(1, "ranks that hold successive layers (PP)", common=True)
    decoder_first_pipeline_num_layers: int | None = field(None, "layers of the first pipeline stage")
    decoder_last_pipeline_num_layers: int | None = field(None, "layers of the last pipeline stage")
    num_virtual_stages_per_pipeline_rank: int | None = field(
        None, "interleaved model chunks per pipeline rank (VPP)", aliases=["virtual_pipeline_model_parallel_size"]
    )
    pipeline_model_parallel_layout: str | None = field(
        None, "what each stage holds: Ettt|tttt|ttL (E embedding, t a layer, L loss; as megatron-core writes it)"
    )
    account_for_embedding_in_pipeline_split: bool = field(False, "the embedding counts as a layer of the first stage")
    account_for_loss_in_pipeline_split: bool = field(False, "the output layer counts as a layer of the last stage")
    context_parallel_size: int = field(
        1,
        "ranks that share each sequence (CP)",
        common=True,
    )
    cp_comm_type: str = field(
        "p2p",
        "how those ranks exchange keys and values with Transformer Engine; without it they gather them",
        choices=["p2p", "all_gather", "a2a"],
    )
    sequence_parallel: bool = field(False, "also divide norms and dropout over the TP ranks", common=True)
    expert_model_parallel_size: int = field(1, "ranks that hold different experts (EP)", common=True)
    expert_tensor_parallel_size: int | None = field(None, "ranks that share each expert (default: TP)")
    overlap_grad_reduce: bool | None = field(
        None, "reduce gradients while the backward pass runs (default: with data parallelism on GPUs)"
    )
    overlap_param_gather: bool | None = field(
        None, "gather parameters while the forward pass runs (default: with data parallelism on GPUs)"
    )
    tp_comm_overlap: bool = field(False, "overlap TP communication with compute (Transformer Engine)")
    distributed_timeout_minutes: int = field(300000, "time after which a collective gives up")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, spec in specs(ParallelArguments).items():
            value = getattr(self, name)
            if name.endswith("_size") and value is not None and value < 1:
                raise UsageError(f"--{spec.name} {value}: must be at least 1")
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            get_logger().info("--sequence_parallel true: no effect with --tensor_model_parallel_size 1")
            self.sequence_parallel = False

        self._check_pipeline()

    def _check_pipeline(self) -> None:
        """The layout says how many model chunks a stage has."""
        layout, pp = self.pipeline_model_parallel_layout, self.pipeline_model_parallel_size
        others = (
            "decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers",
            "account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split",
        )  # fmt: skip
        said = [name for name in others if getattr(self, name)]
        if layout is None:
            if pp == 1 and any(name.startswith("account") for name in said):
                get_logger().info(f"--{said[-1]} true: no effect with --pipeline_model_parallel_size 1")
                self.account_for_embedding_in_pipeline_split = self.account_for_loss_in_pipeline_split = False
            elif len(said) > 1 and said[-1].startswith("account") and said[0].startswith("decoder"):
                raise UsageError(f"--{said[0]} and --{said[-1]}: give one of them")
            return
        if said:
            raise UsageError(f"--pipeline_model_parallel_layout says what each stage holds; leave out --{said[0]}")
        chunks = len(layout_chunks(layout))
        virtual = self.num_virtual_stages_per_pipeline_rank or chunks // pp
        if chunks != virtual * pp:
            raise UsageError(
                f"--pipeline_model_parallel_layout {layout}: has {chunks} parts, which must be "
                f"--pipeline_model_parallel_size {pp}, or a multiple of it"
            )
        self.num_virtual_stages_per_pipeline_rank = virtual if virtual > 1 else None

    def data_parallel_size(self, world_size: int) -> int:
        """Ranks that hold different samples.

        Raises: UsageError if the sizes do not divide the number of processes.
        """
        tp, pp = self.tensor_model_parallel_size, self.pipeline_model_parallel_size
        cp = self.context_parallel_size
        if world_size % (tp * pp * cp):
            raise UsageError(
                f"{world_size} processes cannot be divided into tensor x pipeline x context parallel = {tp} x {pp} x "
                f"{cp}: start a multiple of {tp * pp * cp} processes (NPROC_PER_NODE) or change the sizes"
            )
        expert = self.expert_model_parallel_size * (self.expert_tensor_parallel_size or tp) * pp
        if world_size % expert:
            raise UsageError(
                f"{world_size} processes cannot be divided into expert x expert-tensor x pipeline parallel = "
                f"{self.expert_model_parallel_size} x {self.expert_tensor_parallel_size or tp} x {pp}: start a "
                f"multiple of {expert} processes (NPROC_PER_NODE) or change the sizes"
            )
        return world_size // (tp * pp * cp)


@arguments
class MegatronArguments(ParallelArguments, TrainArguments, TunerArguments, McoreArguments, RunArguments):
    """Megatron: the model as megatron-core builds it, kernels, router"""

    ADVANCED: ClassVar[bool] = True

    @property
    def description(self) -> ModelDescription:
        """The model. Raises: ConfigError before `apply_model_config`."""
        model: ModelDescription | None = self.__dict__.get("_description")
        if model is None:
            raise ConfigError("the model's config is not applied yet (apply_model_config)")
        return model

    # What a user may set over the model's config.
    attention_dropout: float | None = field(None, "dropout of attention weights")
    hidden_dropout: float | None = field(None, "dropout of layer outputs")
    mtp_num_layers: int | None = field(
        None,
        "train this many multi-token-prediction layers (default: none)",
        unavailable=NO_MTP,
    )
    mtp_loss_scaling_factor: float = field(0.1, "weight of the multi-token-prediction loss", unavailable=NO_MTP)

    # How it is trained.
    moe_router_dtype: str | None = field("fp32", "dtype of the router", choices=["fp32", "fp64"])
    moe_router_bias_update_rate: float = field(
        1e-3, "step by which training moves the expert bias (default of trainers: 0, as Hugging Face leaves it)"
    )
    moe_token_dispatcher_type: str = run_setting(
        "alltoall", "how tokens travel to experts", choices=["alltoall", "allgather", "flex"]
    )
    moe_grouped_gemm: bool | None = run_setting(
        None, "one grouped product for all experts (default: where it is there)"
    )
    moe_grouped_impl: str | None = run_setting(
        None,
        "whose grouped products: torch's with one weight for all experts, or Transformer Engine's (default: torch's in "
        "bf16 on GPUs that have the kernel)",
        choices=["torch", "te"],
    )
    moe_permute_fusion: bool | None = run_setting(
        None, "fused permutation of tokens (default: with Transformer Engine)"
    )
    moe_shared_expert_overlap: bool = run_setting(False, "shared experts run while tokens travel")
    moe_expert_capacity_factor: float | None = field(None, "drop tokens above this multiple of an even share")
    moe_pad_expert_input_to_capacity: bool = field(False, "pad experts' inputs to their capacity")
    moe_token_drop_policy: str = field("probs", "which tokens are dropped", choices=["probs", "position"])

    recompute_granularity: str | None = run_setting(
        "selective", "what is recomputed in the backward pass", choices=["full", "selective", "none"]
    )
    recompute_method: str | None = run_setting(None, "how layers are grouped", choices=["uniform", "block"])
    recompute_num_layers: int | None = run_setting(None, "layers of a group")
    recompute_modules: list[str] = run_setting(
        ["core_attn"], "what selective recomputation covers (core_attn: where its kernel keeps the scores)",
        choices=["core_attn", "mla_up_proj", "layernorm", "mlp", "moe", "moe_act", "shared_experts"],
    )  # fmt: skip
    fine_grained_activation_offloading: bool = run_setting(
        False, "inputs of --offload_modules wait for the backward pass in host memory"
    )
    offload_modules: list[str] = run_setting([], "modules whose inputs do", choices=OFFLOADED)
    min_offloaded_tensor_size: int = run_setting(1024 * 1024, "smaller ones stay (elements)", least=0)
    use_cpu_initialization: bool = run_setting(False, "make weights on the CPU")
    calculate_per_token_loss: bool = field(
        True,
        "average the loss over all tokens of the global batch",
        unavailable={"MegatronDpoArguments": AVERAGED_PAIRS},
    )
    cross_entropy_loss_fusion: bool | None = run_setting(
        None, "fused cross entropy (default: with Transformer Engine, and then te)"
    )
    cross_entropy_fusion_impl: str = run_setting("native", "which one", choices=["native", "te"])
    loss_chunk_size: int | None = run_setting(
        None, "tokens whose logits are in memory at a time (default: all, up to 2 billion logits)", least=1
    )
    cuda_graph: bool | None = run_setting(
        None,
        "replay the passes of a step as one CUDA graph once their shapes came up twice (default: where nothing in them "
        "waits for the host)",
    )
    gradient_accumulation_fusion: bool = run_setting(True, "add weight gradients in place (needs a CUDA extension)")
    masked_softmax_fusion: bool = run_setting(True, "fused softmax (needs a CUDA extension)")
    bias_swiglu_fusion: bool = run_setting(True, "fused SwiGLU")
    bias_dropout_fusion: bool = run_setting(True, "fused bias, dropout and residual")
    apply_rope_fusion: bool = run_setting(True, "fused rotary embedding where it computes the same")
    attention_softmax_in_fp32: bool = field(True, "softmax in fp32")
    apply_query_key_layer_scaling: bool = field(False, "scale scores by the layer number")
    optimizer_cpu_offload: bool = run_setting(
        False, "keep optimizer states and fp32 main weights in host memory and update them there"
    )
    optimizer_offload_fraction: float = run_setting(1.0, "share of the weights whose states are there", least=0, most=1)
    overlap_cpu_optimizer_d2h_h2d: bool = run_setting(True, "update one weight while others are on their way")
    use_precision_aware_optimizer: bool = run_setting(False, "optimizer states in the dtypes that follow")
    main_grads_dtype: str = run_setting("fp32", "dtype in which gradients are added up", choices=["fp32", "bf16"])
    main_params_dtype: str = run_setting("fp32", "dtype of the optimizer's main weights", choices=["fp32", "fp16"])
    exp_avg_dtype: str = run_setting("fp32", "dtype of Adam's first moment", choices=MOMENT_DTYPES)
    exp_avg_sq_dtype: str = run_setting("fp32", "dtype of Adam's second moment", choices=MOMENT_DTYPES)
    fp8_format: str | None = field(
        None, "products of linear layers in FP8; hybrid: gradients as e5m2 (default: none)", choices=["e4m3", "hybrid"]
    )
    fp8_recipe: str = field(
        "delayed", "what has a scale, and when it is found", choices=["delayed", "tensorwise", "blockwise", "mxfp8"]
    )
    fp8_param_gather: bool = run_setting(False, "gather parameters in FP8", unavailable=BF16_WEIGHTS)
    deterministic_mode: bool = run_setting(False, "only kernels that give the same bits each time")

    async_save: bool = run_setting(False, "write checkpoints in the background while training continues")
    no_save_optim: bool = run_setting(False, "checkpoints without optimizer")
    no_save_rng: bool = run_setting(False, "checkpoints without RNG state")
    no_load_optim: bool = run_setting(False, "do not read the optimizer of the checkpoint")
    no_load_rng: bool = run_setting(False, "do not read the RNG state of the checkpoint")
    seq_length: int | None = field(None, "length of a training sequence (default: --max_length or the model's)")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.recompute is not None:
            self.recompute_granularity = None if self.recompute == "none" else self.recompute
        if self.recompute_granularity == "none":
            self.recompute_granularity = None
        if self.recompute_granularity == "full":
            self.recompute_method = self.recompute_method or "uniform"
            self.recompute_num_layers = self.recompute_num_layers or 1
        elif self.recompute_method is not None or self.recompute_num_layers is not None:
            raise UsageError("--recompute_method and --recompute_num_layers: need --recompute_granularity full")
        self._check_optimizer()
        self._check_offloading()
        if "fp8_recipe" in self.given and self.fp8_format is None:
            raise UsageError(f"--fp8_recipe {self.fp8_recipe}: say which numbers with --fp8_format e4m3 or hybrid")
        if self.save_weights_only:
            self.no_save_optim = self.no_save_rng = True
        if self.moe_router_dtype == "none":
            self.moe_router_dtype = None
        if self.logging_dir is None and self.output_dir is not None:
            self.logging_dir = f"{self.output_dir}/runs"

    def _check_optimizer(self) -> None:
        asked = self.optimizer_cpu_offload or self.use_precision_aware_optimizer
        if asked and self.train_type == "lora":
            get_logger().info("the optimizer's states of adapters are few: they stay in fp32 on the GPUs")
            self.optimizer_cpu_offload = self.use_precision_aware_optimizer = False
        lower = [name for name in OPTIMIZER_DTYPES if getattr(self, name) != "fp32"]
        if lower and not asked:
            raise UsageError(f"--{lower[0]} {getattr(self, lower[0])}: needs --use_precision_aware_optimizer true")
        for name in lower if self.optimizer_cpu_offload else ():
            if name != "main_grads_dtype":
                get_logger().info(
                    f"--{name} {getattr(self, name)}: fp32, as all states with --optimizer_cpu_offload true"
                )
                setattr(self, name, "fp32")

    def _check_offloading(self) -> None:
        if self.fine_grained_activation_offloading != bool(self.offload_modules):
            raise UsageError(
                f"--fine_grained_activation_offloading: needs --offload_modules, some of {' '.join(OFFLOADED)}; and "
                "the other way round"
            )
        if self.offload_modules and self.recompute_granularity == "full":
            raise UsageError("--offload_modules: with --recompute full nothing of a layer is kept; choose one of them")
        if "attn_proj" in self.offload_modules and "core_attn" not in self.offload_modules:
            raise UsageError("--offload_modules attn_proj: its input is core_attn's output; add core_attn")

    def apply_model_config(self, config: Config) -> None:
        """Take the model from the converted config (Megatron names, as `convert_hf_config` returns them).

        What the user set of OVERRIDES takes the place of the model's.
        Raises: ConfigError for a name that describes nothing; UsageError for a layout that does not fit the model.
        """
        mine = {
            name: getattr(self, name) for name in OVERRIDES if name in self.given and getattr(self, name) is not None
        }
        for name, value in mine.items():
            if value != config.get(name, value):
                get_logger().info(f"--{name} {value} instead of the model's {config[name]}")
        self._describe(ModelDescription.of({**config, **mine}))

    def _describe(self, model: ModelDescription) -> None:
        """Settle what follows from the model."""
        self.__dict__["_description"] = model
        for name in OVERRIDES:
            setattr(self, name, getattr(model, name))
        if self.apply_rope_fusion and (model.multi_latent_attention or model.rotary_interleaved):
            self.apply_rope_fusion = False
        if model.num_experts and not model.disable_bias_linear:
            if self.expert_tensor_parallel_size not in (None, 1):
                raise UsageError(
                    f"--expert_tensor_parallel_size {self.expert_tensor_parallel_size}: must be 1 for experts with biases, "
                    "as megatron-core divides none; leave it out"
                )
            self.expert_tensor_parallel_size = 1
        if self.seq_length is None:
            self.seq_length = getattr(self, "max_length", None) or model.max_position_embeddings
        self._check_model(model)

    def _check_model(self, model: ModelDescription) -> None:
        length, chosen = getattr(self, "max_length", 0), model.dsa_indexer_topk
        if chosen and (length is None or length > chosen):
            raise UsageError(
                f"--max_length {length}: a token of this model sees {chosen} tokens that an indexer chooses, on Megatron "
                f"all of them, which is the same up to --max_length {chosen}. `swiftlite sft` trains longer texts"
            )
        heads, groups = model.num_attention_heads, model.num_query_groups
        tp, ep = self.tensor_model_parallel_size, self.expert_model_parallel_size
        chunk_layers(self, model.num_layers)
        if heads % tp:
            raise UsageError(f"--tensor_model_parallel_size {tp}: must divide {heads} attention heads")
        if not model.multi_latent_attention and groups and max(groups, tp) % min(groups, tp):
            raise UsageError(
                f"--tensor_model_parallel_size {tp}: must divide {groups} key/value heads or be a multiple of them"
            )
        if (model.linear_num_key_heads or tp) % tp:
            raise UsageError(
                f"--tensor_model_parallel_size {tp}: must divide {model.linear_num_key_heads} key heads of linear attention"
            )
        if ep > 1 and not model.num_experts:
            raise UsageError(f"--expert_model_parallel_size {ep}: the model has no experts")
        if model.num_experts and model.num_experts % ep:
            raise UsageError(f"--expert_model_parallel_size {ep}: must divide {model.num_experts} experts")
        if model.num_experts and self.moe_token_dispatcher_type == "flex":
            self._check_flex()
        self._check_capacity(model)
        self._check_recompute(model)
        experts = {"expert_fc1", "moe_act"}.intersection(self.offload_modules)
        if experts and not model.num_experts:
            raise UsageError(f"--offload_modules {' '.join(experts)}: the model has no experts; leave it out")
        if experts and "moe" in self.recompute_modules and self.recompute_granularity:
            raise UsageError(f"--offload_modules {' '.join(experts)}: --recompute_modules moe keeps none of it")
        self._check_fp8(model)

    def _check_flex(self) -> None:
        parts = self.expert_model_parallel_size * (self.expert_tensor_parallel_size or self.tensor_model_parallel_size)
        if parts == 1:
            raise UsageError(
                "--moe_token_dispatcher_type flex: needs --expert_model_parallel_size of at least 2; leave it out"
            )
        if importlib.util.find_spec("deep_ep") is None:
            raise UsageError("--moe_token_dispatcher_type flex: needs the package deep_ep and CUDA; use alltoall")

    def _check_recompute(self, model: ModelDescription) -> None:
        """What was asked for by name is there to be recomputed."""
        if "recompute_modules" not in self.given:
            return
        if self.recompute_granularity != "selective":
            raise UsageError(
                f"--recompute_modules {' '.join(self.recompute_modules)}: needs --recompute selective, not "
                f"{self.recompute_granularity or 'none'}"
            )
        experts = model.moe_layer_pattern
        there = {
            "moe": any(experts), "moe_act": any(experts), "mlp": not all(experts),
            "shared_experts": bool(model.moe_shared_expert_intermediate_size),
            "mla_up_proj": bool(model.multi_latent_attention),
        }  # fmt: skip
        for module in self.recompute_modules:
            if not there.get(module, True):
                raise UsageError(f"--recompute_modules {module}: the model has none; leave it out")
        if "shared_experts" in self.recompute_modules and self.moe_shared_expert_overlap:
            raise UsageError("--recompute_modules shared_experts: not with --moe_shared_expert_overlap true")
        found = {"moe_act", "layernorm"}.intersection(self.recompute_modules)
        if found and self.fp8_format and self.fp8_recipe == "delayed":
            raise UsageError(f"--recompute_modules {' '.join(found)}: not with --fp8_recipe delayed; take blockwise")

    def _check_fp8(self, model: ModelDescription) -> None:
        if self.fp8_format is None:
            return
        tp = self.tensor_model_parallel_size
        sizes = {"hidden_size": model.hidden_size, "ffn_hidden_size": model.ffn_hidden_size / tp}
        if model.num_experts:
            parts = self.expert_tensor_parallel_size or tp
            sizes["moe_ffn_hidden_size"] = (model.moe_ffn_hidden_size or 0) / parts
        for name, size in sizes.items():
            if size % 16:
                raise UsageError(
                    f"--fp8_format {self.fp8_format}: the {name} of each rank must be a multiple of 16, not {size:g}"
                )

    @property
    def length_unit(self) -> int:
        """Tokens of which a rank must have a multiple, for its kernels."""
        return 1 if self.fp8_format is None else 128 if self.fp8_recipe == "blockwise" else 32

    def _check_capacity(self, model: ModelDescription) -> None:
        factor, pad = self.moe_expert_capacity_factor, self.moe_pad_expert_input_to_capacity
        if factor is not None and not 0 < factor < float("inf"):
            raise UsageError(f"--moe_expert_capacity_factor {factor}: must be above 0; leave it out to drop nothing")
        if pad and factor is None:
            raise UsageError("--moe_pad_expert_input_to_capacity true: needs --moe_expert_capacity_factor")
        if pad and factor and model.num_experts and factor * model.moe_router_topk > model.num_experts:
            raise UsageError(
                f"--moe_expert_capacity_factor {factor}: with --moe_pad_expert_input_to_capacity true at most "
                f"{model.num_experts / model.moe_router_topk:g} (experts / experts of a token): an expert has no more "
                "tokens than there are"
            )

    def parse_to_megatron(self) -> tuple[list[str], Json]:
        """(argv, extra_args), see `swiftlite.arguments.ms_swift.parse_to_megatron`."""
        from swiftlite.arguments.ms_swift import parse_to_megatron

        return parse_to_megatron(self)

    def megatron_lm_args(self) -> list[str] | str:
        """Arguments for stock Megatron-LM, see `swiftlite.arguments.bridge.megatron_lm_args`."""
        from swiftlite.arguments.bridge import megatron_lm_args

        return megatron_lm_args(self)

    def checkpoint_args(self) -> Json:
        """Plain values for a checkpoint's `args`, see `swiftlite.arguments.bridge.checkpoint_args`."""
        from swiftlite.arguments.bridge import checkpoint_args

        return checkpoint_args(self)
