"""Flags that users of other tools type and that are not fields here: accepted with the reason, or refused with it.

Together with the fields they make docs/flags.md.
"""

from __future__ import annotations

from swiftlite.arguments.parser import Note

_TEXT_ONLY = "the models here are text only, there is no vision tower"
_NO_PARALLEL = "conversion streams tensors and makes no model, so its result is the same for every layout"
_OTHER_TUNER = (
    "no tuner of peft; --train_type says which there are, --optim adamw_8bit and --recompute full save memory"
)
NO_QUANTISING = "`export --fp8` writes FP8 weights; for other kinds export bf16 and use the tool of choice"
_NO_QUANTISING = Note("rejected", NO_QUANTISING)
_BENCHMARKS = "belongs to `swiftlite eval`: --metrics judges answers, --eval_backend lm_eval runs benchmarks"
_DPO = "belongs to preference training: `swiftlite dpo` or `swiftlite megatron dpo`"

# Why a field does not act, for the fields' records.
BF16_WEIGHTS = Note(
    "default",
    "weights are kept and gathered in bf16 and made FP8 once a step: the same numbers, two bytes more a weight",
)
NO_BIASES = {
    "MegatronSftArguments": "with LoRA on Megatron biases stay as they are; leave it out, or use `swiftlite sft`"
}
NO_MTP = {
    "MegatronDpoArguments": Note("rejected", "preference training has no multi-token-prediction loss; leave it out")
}
ONLY_TRANSFORMERS = {
    "MegatronArguments": Note("rejected", "acts with transformers only (`swiftlite sft`); leave it out")
}
NO_WEIGHTS = Note("rejected", "has no effect: preview reads no weights")
AVERAGED_PAIRS = Note("default", "pairs are averaged over the global batch", allowed=("false",))

COMMON_NOTES: dict[str, Note] = {
    "lazy_tokenize": Note("default", "rows are tokenised before training, or while it runs with --streaming true"),
    "packing_num_proc": Note("default", "packing takes no time worth dividing; --dataset_num_proc divides tokenising"),
    "strict": Note("default", "--max_drop_ratio says how many rows may be unusable; 0: none", allowed=("false",)),
    "freeze_llm": Note("default", _TEXT_ONLY, allowed=("false",)),
    "freeze_language_model": Note("default", _TEXT_ONLY, allowed=("false",)),
    **dict.fromkeys(
        (
            "freeze_vit",
            "freeze_aligner",
            "vit_lr",
            "aligner_lr",
            "vit_gradient_checkpointing",
            "vit_attn_impl",
            "vit_gradient_checkpointing_kwargs",
            "language_model_only",
            "freeze_vision_tower",
            "freeze_multi_modal_projector",
            "image_max_pixels",
            "image_min_pixels",
            "video_max_pixels",
            "video_min_pixels",
            "video_fps",
            "video_maxlen",
            "model_kwargs",
        ),
        Note("default", _TEXT_ONLY),
    ),
    "linear_decoupled_in_proj": Note(
        "default", "projections that the checkpoint keeps apart have adapters of their own"
    ),
    **dict.fromkeys(("quant_n_samples", "quant_batch_size", "group_size"), _NO_QUANTISING),
    "val_dataset_sample": Note("rejected", "write the number behind the dataset: --val_dataset FILE#1000"),
    "val_dataset_shuffle": Note("default", "an evaluation is a mean over all rows, in any order"),
    "download_mode": Note("default", "what was downloaded is used again", allowed=("reuse_dataset_if_exists",)),
    "remove_unused_columns": Note("default", "columns that training does not read have no effect"),
    "disable_auto_column_mapping": Note("default", "--columns renames columns", allowed=("false",)),
    "is_binary_loss_scale": Note("default", "weights of 0 and 1 need no more memory than labels"),
    "preserve_thinking": Note("default", "the chat template says which thoughts stay", allowed=("false", "none")),
    "check_model": Note("default", "a model's files are held against its config.json in any case"),
    "load_args": Note("default", "an adapter's directory says base, template and system message"),
    "ddp_backend": Note("default", "NCCL on GPUs, gloo on CPUs", allowed=("nccl", "gloo", "none")),
    "enable_npu_model_patch": Note("default", "there are no patches"),
    "ignore_args_error": Note("default", "words that no flag takes are errors", allowed=("false",)),
    "local_repo_path": Note("rejected", "no model here needs a repository besides its directory"),
    "init_strategy": Note("rejected", "every weight of a model must be in its checkpoint"),
    "max_model_len": Note("rejected", "positions are scaled as config.json says; write rope_scaling there"),
    **dict.fromkeys(
        ("ray_exp_name", "device_groups", "ray_num_workers"),
        Note("default", "torchrun starts the processes: NPROC_PER_NODE, NNODES"),
    ),
    "use_ray": Note("default", "torchrun starts the processes: NPROC_PER_NODE, NNODES", allowed=("false",)),
    "to_ollama": Note("rejected", "`ollama create` reads Hugging Face directories"),
    "overwrite_cache": Note("default", "the cache is by content, so it is never stale"),
    "overwrite_output_dir": Note(
        "default",
        "the same run resumes from its own checkpoints; nothing of another run is overwritten: --add_version true",
    ),
    "do_train": Note("default", "the command says what is done", allowed=("true",)),
    "do_eval": Note("default", "evaluation runs where there is validation data"),
    "do_predict": Note("rejected", "answers to a dataset: `swiftlite infer --val_dataset FILE`"),
    "print_param_status": Note("default", "the start of a run says what is trained"),
    "push_to_hub": Note(
        "rejected", "push the directory afterwards: `swiftlite export --model DIR --push_to_hub true --hub_model_id ID`"
    ),
}

EXPORT_NOTES: dict[str, Note] = {
    "quant_bits": _NO_QUANTISING,
    **dict.fromkeys(
        ("tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size",
         "expert_tensor_parallel_size", "context_parallel_size", "sequence_parallel", "decoder_first_pipeline_num_layers",
         "decoder_last_pipeline_num_layers"),
        Note("default", _NO_PARALLEL),
    ),
    "mtp_num_layers": Note("default", "MTP layers of the checkpoint are always converted"),
    **dict.fromkeys(("export_device", "export_size"), Note("default", "tensors are streamed; see --max_shard_size")),
    "export_legacy_format": Note("default", "files are safetensors", allowed=("false",)),
    "export_quantization_bit": _NO_QUANTISING,
    "save_missing_weights": Note("default", "every tensor of the source is accounted for, or the command fails"),
    "load_data_args": Note("rejected", "name the data that is tokenised with --dataset"),
    "fp8_format": Note("default", "FP8 weights are e4m3; --fp8 block writes them", allowed=("e4m3",)),
    "fp8_param_gather": Note("default", "conversion gathers nothing; --fp8 block writes FP8 weights"),
}  # fmt: skip

_BATCHES = "samples are token ids before training begins, so a batch takes no time worth dividing (see data_s)"
TRAIN_NOTES: dict[str, Note] = {
    **dict.fromkeys(
        ("dataloader_num_workers", "num_workers", "dataloader_persistent_workers", "dataloader_prefetch_factor",
         "dataloader_pin_memory"),
        Note("default", _BATCHES),
    ),
    "per_device_eval_batch_size": Note("default", "evaluation takes --micro_batch_size; its values are means over tokens"),
    "dataloader_drop_last": Note("default", "every step has a whole global batch; the last one continues in the next epoch"),
    "gradient_checkpointing_kwargs": Note(
        "default", "recomputation is never re-entrant", allowed=('{"use_reentrant": false}', "{'use_reentrant': false}")
    ),
    "resume_only_model": Note("rejected", "begin from the checkpoint's weights with --model DIR and a new --output_dir"),
    "logging_first_step": Note("default", "the first step is always logged", allowed=("true",)),
    **dict.fromkeys(
        ("eval_on_start", "use_flash_ckpt", "create_checkpoint_symlink", "full_determinism", "dist_ckpt_save_pre_mcore_014",
         "apply_wd_to_qk_layernorm", "mtp_shared_weights", "mtp_decoder_input_detach", "perform_initialization",
         "align_param_gather", "mlp_padding_free", "optimizer_cuda_graph", "use_megatron_fsdp", "use_fused_mhc",
         "mixture_of_depths", "use_kt", "data_parallel_random_init",
         "csa_dense_mode", "use_llama_pro", "use_adam_mini", "use_apollo", "use_asft_loss", "use_eaft_loss"),
        Note("default", "there is no such thing here", allowed=("false", "none")),
    ),
    **dict.fromkeys(
        ("save_on_each_node", "ddp_find_unused_parameters", "average_tokens_across_devices", "acc_strategy", "manual_gc",
         "manual_gc_eval", "manual_gc_steps", "te_rng_tracker", "use_persistent_ckpt_worker", "tensorboard_queue_size",
         "distrib_optim_fully_reshardable_mem_efficient", "data_sharding", "cp_partition_mode",
         "batch_p2p_comm", "use_v1_kernels", "use_reentrant_gc",
         "accumulate_allreduce_grads_in_fp32", "grad_reduce_in_fp32", "bias_activation_fusion"),
        Note("default", "swiftlite settles it; results are those of its default, gradients and means are exact in fp32"),
    ),
    "dist_ckpt_optim_fully_reshardable": Note("default", "checkpoints resume under any layout", allowed=("true",)),
    **dict.fromkeys(
        ("fp8_amax_compute_algo", "fp8_amax_history_len", "data_parallel_sharding_strategy"),
        Note("rejected", "it has the default of Transformer Engine or megatron-core; leave it out"),
    ),
    "safe_serialization": Note("default", "files are safetensors", allowed=("true",)),
    "train_dataloader_shuffle": Note("default", "order: --dataset_shuffle, --data_seed", allowed=("true",)),
    "disable_ignore_empty_think": Note("default", "--loss_scale says it"),
    "lr_warmup_init": Note("default", "the warm-up begins at 0", allowed=("0", "0.0")),
    "weight_decay_incr_style": Note("default", "weight decay is constant", allowed=("constant",)),
    **dict.fromkeys(("start_weight_decay", "end_weight_decay"), Note("rejected", "it is constant: --weight_decay")),
    "swanlab_mode": Note("default", "swanlab's own settings hold", allowed=("cloud",)),
    **dict.fromkeys(
        ("swanlab_token", "swanlab_workspace", "swanlab_webhook_url", "swanlab_secret", "swanlab_notification_method"),
        Note("rejected", "log in with `swanlab login`, or set SWANLAB_API_KEY and swanlab's other variables"),
    ),
    "pure_bf16": Note("default", "--torch_dtype bfloat16 computes in bf16; weights that are trained are held in fp32"),
    **dict.fromkeys(
        ("tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size", "sequence_parallel",
         "recompute_granularity", "moe_grouped_gemm", "moe_token_dispatcher_type", "overlap_param_gather",
         "overlap_grad_reduce", "apply_rope_fusion", "mcore_model"),
        Note("rejected", "belongs to Megatron: `swiftlite megatron sft`, pt or dpo"),
    ),
    **dict.fromkeys(("fp8", "fp8_backend"), Note("rejected", "`swiftlite megatron sft --fp8_format e4m3` trains in FP8")),
    "callbacks": Note("rejected", "a file of --external_plugins registers them, see examples/plugins/callback.py"),
    "eval_metric": Note("rejected", _BENCHMARKS),
    "target_parameters": Note("rejected", "each expert has layers with names; name them with --target_modules"),
    "moe_enable_deepep": Note("rejected", "say it with --moe_token_dispatcher_type flex"),
    "megatron_extra_kwargs": Note("rejected", "the model's config says what megatron-core is given"),
    **dict.fromkeys(("fp4_format", "fp4_recipe"), Note("rejected", "training in FP4 is not available")),
    **dict.fromkeys(
        ("microbatch_group_size_per_vp_stage", "sequence_packing_scheduler", "mhc_recompute_layer_num", "sgd_momentum",
         "dsa_indexer_loss_coeff", "dsa_indexer_use_sparse_loss", "apply_dsa_kernel_fusion", "mrl_dims"),
        Note("rejected", "nothing here reads it; leave it out"),
    ),
    **dict.fromkeys(
        ("muon_momentum", "muon_num_ns_steps", "muon_use_nesterov", "muon_scale_mode", "muon_extra_scale_factor",
         "muon_split_qkv", "muon_tp_mode", "muon_coefficient_type", "muon_fp32_matmul_prec", "muon_scalar_optimizer"),
        Note("rejected", "--optim muon has torch's settings"),
    ),
    **dict.fromkeys(
        ("adalora_target_r", "adalora_init_r", "adalora_tinit", "adalora_tfinal", "adalora_deltaT", "adalora_beta1",
         "adalora_beta2", "adalora_orth_reg_weight", "boft_block_size", "boft_block_num", "boft_n_butterfly_factor",
         "boft_dropout", "vera_rank", "vera_projection_prng_key", "vera_dropout", "vera_d_initial", "fourier_n_frequency",
         "fourier_scaling", "oft_block_size"),
        Note("rejected", "say it with --tuner_settings, under peft's name: '{\"boft_block_size\": 8}'"),
    ),
    "oft_target": Note("rejected", "say it with --target_modules"),
    "use_muon": Note("rejected", "say it with --optim muon"),
    **dict.fromkeys(("pissa_init", "pissa_iter", "pissa_convert"), Note("rejected", "say it with --init_weights pissa")),
    "logging_strategy": Note("default", "--logging_steps says when", allowed=("steps",)),
    "label_names": Note("default", "the labels are `labels`", allowed=("labels",)),
    "use_logits_to_keep": Note(
        "default", "the loss is of the positions that have labels, whether or not logits of the others are made"
    ),
    "tuner_backend": Note(
        "default", "adapters are PEFT's; Unsloth's kernels compute the same, faster on one GPU", allowed=("peft", "unsloth")
    ),
    **dict.fromkeys(
        ("use_galore", "galore_quantization", "galore_optim_per_parameter", "galore_rank", "lisa_activated_layers",
         "lisa_step_interval", "llamapro_num_new_blocks", "lora_ga_batch_size", "lora_ga_iters", "lora_ga_max_length",
         "lora_ga_direction", "lora_ga_scale", "lora_ga_stable_gamma", "shift_attn", "use_badam", "freeze_extra_modules",
         "freeze_trainable_modules", "llamapro_num_groups", "reft_layers", "reft_rank", "reft_intervention_type",
         "reft_args", "galore_target_modules", "galore_update_proj_gap", "galore_scale", "galore_proj_type",
         "galore_with_embedding"),
        Note("rejected", _OTHER_TUNER),
    ),
    "optim_args": Note("rejected", "AdamW is set by --adam_beta1, --adam_beta2, --adam_eps and --weight_decay"),
    **dict.fromkeys(
        ("eval_use_evalscope", "eval_dataset", "eval_dataset_args", "eval_limit", "eval_generation_config",
         "compute_accuracy"),
        Note("rejected", f"{_BENCHMARKS}; data to evaluate the loss on: --val_dataset"),
    ),
    "predict_with_generate": Note("rejected", "answers to a dataset: `swiftlite infer --val_dataset FILE`"),
    "rope_scaling": Note("rejected", "positions are scaled as config.json says; write it there"),
    "resize_vocab": Note("rejected", "new tokens come with --new_special_tokens"),
    "create_new_adapter": Note("rejected", "merge the first one (`swiftlite export --merge_lora true`) and train on"),
    "freeze_trainable_layers": Note("rejected", "say it with --train_type freeze and --freeze_parameters"),
    "default_system": Note("rejected", "say it with --system"),
    "tokenized_path": Note("rejected", "say it with --cached_dataset, which `export --to_cached_dataset true` writes"),
    "mix_strategy": Note("default", "datasets are joined; with --interleave_prob, see --stopping_strategy", ("concat",)),
    "load_best_model_at_end": Note("default", "the best checkpoint stays on disk and is named at the end"),
    "disable_gradient_checkpointing": Note("default", "--recompute says what is recomputed, which changes no result"),
    "upcast_layernorm": Note(
        "default", "weights that are trained are held in fp32, others keep the checkpoint's dtype", allowed=("false",)
    ),
    "torch_compile": Note("default", "not compiled", allowed=("false",)),
    "plot_loss": Note("default", "a plot is always written next to the log", allowed=("true",)),
    "include_num_input_tokens_seen": Note("default", "log lines tell tokens"),
    "neat_packing": Note("default", "packed samples never see each other; pack with --packing true"),
    "mask_history": Note("rejected", "train on the last answer only with --loss_scale last_round"),
    "train_on_prompt": Note("rejected", "train on all tokens with --loss_scale all"),
    "use_unsloth": Note("default", "not used", allowed=("false",)),
    "stage": Note("default", "the command says it: sft, pt or dpo", allowed=("sft", "pt")),
    "finetune": Note("default", "a first start loads weights only, and the same command resumes its own run"),
    **dict.fromkeys(
        ("rlhf_type", "pref_beta", "pref_loss", "beta", "rpo_alpha", "ref_model", "mcore_ref_model", "ref_adapters"),
        Note("rejected", _DPO),
    ),
    "use_distributed_optimizer": Note(
        "default", "the optimizer is always the distributed one, so that one checkpoint format serves every layout",
        allowed=("true",),
    ),
    "ckpt_format": Note("default", "checkpoints are torch_dist", allowed=("torch_dist",)),
    "async_save": Note("default", "transformers writes while training waits", allowed=("false",)),
    "overlap_p2p_comm": Note("default", "megatron-core decides this by the pipeline schedule"),
    "transformer_impl": Note("default", "Transformer Engine is used where it is installed with CUDA"),
    "no_initialization": Note("default", "weights are loaded, not initialised", allowed=("true",)),
    "position_embedding_type": Note("default", "all supported models use rotary embeddings", allowed=("rope",)),
}  # fmt: skip

# Flags of reinforcement learning, of distillation from a teacher, and of the servers that they ask for answers.
_ONLINE = (
    "use_vllm", "vllm_mode", "vllm_server_host", "vllm_server_port", "vllm_server_timeout",
    "vllm_server_base_url",
    "vllm_gpu_memory_utilization", "vllm_tensor_parallel_size", "vllm_max_model_len", "vllm_enforce_eager",
    "vllm_limit_mm_per_prompt", "vllm_enable_prefix_caching", "sleep_level", "offload_model", "offload_optimizer",
    "move_model_batches", "reward_funcs", "reward_model", "reward_model_plugin", "reward_weights", "reward_adapters",
    "num_generations", "num_iterations", "steps_per_generation", "generation_batch_size", "max_completion_length",
    "response_length", "advantage_estimator", "scale_rewards", "kl_in_reward", "importance_sampling_level", "epsilon",
    "epsilon_high", "delta", "overlong_filter", "dynamic_sample", "log_completions", "async_generate",
    "multi_turn_scheduler", "max_turns", "top_p", "top_k", "rollout_importance_sampling_mode",
)  # fmt: skip
OTHER_PREFERENCES = (
    "dpo, cpo, simpo, orpo, kto, gkd on the data's answers and reward models (rm) are trained here; GRPO, PPO, gkd on the "
    "student's own answers: TRL or ms-swift on the Hugging Face directory, verl for GRPO with vLLM at scale; convert the "
    "result here"
)
_KEPT = "`swiftlite export --to_teacher_logits true`, then --teacher_logits DIR"
_TEACHER: dict[str, Note] = {
    "gkd_logits_topk": Note("rejected", f"--teacher_topk K says it where a teacher's answers are kept: {_KEPT}"),
    "teacher_model_server": Note(
        "rejected", f"give the teacher's directory with --teacher_model, or have it answer before training: {_KEPT}"
    ),
    "offload_teacher_model": Note(
        "default", f"the teacher stays where it is; for training without it in memory: {_KEPT}", allowed=("false",)
    ),
    "teacher_adapters": Note("rejected", "merge them into the teacher: `swiftlite export --merge_lora true`"),
    "teacher_deepspeed": Note(
        "default", "the teacher is divided over the ranks as the model is", allowed=("zero0", "zero1", "zero2", "zero3")
    ),
    "seq_kd": Note(
        "default",
        "for a teacher's answers as data: `swiftlite infer --val_dataset FILE` writes them",
        allowed=("false",),
    ),
}

DPO_NOTES: dict[str, Note] = {
    "reference_free": Note("default", "there is a reference", allowed=("false",)),
    "f_divergence_type": Note("default", "the loss is of the reverse KL divergence", allowed=("reverse_kl",)),
    **dict.fromkeys(("ref_model_type", "ref_model_revision"), Note("default", "--ref_model's directory says it")),
    **dict.fromkeys(_ONLINE, Note("rejected", OTHER_PREFERENCES)),
    **_TEACHER,
    "stage": Note("default", "the command says it: sft, pt or dpo", allowed=("dpo",)),
    "mcore_ref_model": Note("rejected", "the reference is a Hugging Face model here: give it with --ref_model"),
    "calculate_per_token_loss": AVERAGED_PAIRS,
}

INFER_NOTES: dict[str, Note] = {
    **dict.fromkeys(
        ("quant_method", "quant_bits"), Note("rejected", "answers are computed with the weights as they are stored")
    ),
    **dict.fromkeys(
        ("vllm_pipeline_parallel_size", "vllm_enforce_eager", "vllm_max_num_seqs", "vllm_enable_prefix_caching",
         "vllm_speculative_config", "vllm_limit_mm_per_prompt", "lmdeploy_tp", "lmdeploy_session_len",
         "lmdeploy_cache_max_entry_count", "lmdeploy_vision_batch_size"),
        Note("default", "answers are the same without it; a server takes it: `swiftlite deploy ... -- --enforce-eager`"),
    ),
    **dict.fromkeys(
        ("logprobs", "top_logprobs", "structured_outputs_regex"),
        Note("rejected", "ask a server that gives them: `swiftlite deploy --infer_backend vllm`"),
    ),
    "write_batch_size": Note("default", "answers are written as soon as a batch of --max_batch_size is done"),
    "reranker_use_activation": Note("rejected", "scores are logits; their sigmoid is a probability"),
    "result_dir": Note("rejected", "name the file with --result_path"),
    "deepspeed": Note("rejected", "belongs to training"),
}  # fmt: skip

EVAL_NOTES: dict[str, Note] = {
    **dict.fromkeys(("quant_method", "quant_bits"), Note("rejected", "weights are evaluated as they are stored")),
    **dict.fromkeys(
        ("num_beams", "stream", "response_prefix", "merge_lora", "padding_free"),
        Note("rejected", "has no effect on evaluation"),
    ),
    "eval_url": Note("rejected", "give the model itself with --model; lm_eval asks a server with its own flags"),
    **dict.fromkeys(
        ("eval_output_dir", "eval_dataset_args", "eval_generation_config", "extra_eval_args", "eval_num_proc"),
        Note("rejected", "write lm_eval's own flags last, behind --: `-- --gen_kwargs temperature=0`"),
    ),
}  # fmt: skip

_BEHIND = Note("rejected", "write the engine's own flags last, behind --: `-- --enforce-eager`")
_ASKED = Note("rejected", "clients say it in their requests; generation_config.json where they do not")
DEPLOY_NOTES: dict[str, Note] = {
    **dict.fromkeys(
        ("vllm_pipeline_parallel_size", "vllm_max_num_seqs", "vllm_enable_prefix_caching",
         "vllm_speculative_config", "vllm_limit_mm_per_prompt", "vllm_max_lora_rank", "vllm_data_parallel_size",
         "vllm_reasoning_parser", "vllm_engine_kwargs", "vllm_use_async_engine", "sglang_dp_size", "sglang_pp_size",
         "sglang_ep_size", "sglang_kv_cache_dtype", "sglang_quantization", "sglang_disable_cuda_graph", "log_level",
         "ssl_keyfile", "ssl_certfile", "max_logprobs"),
        _BEHIND,
    ),
    **dict.fromkeys(
        ("max_new_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "num_beams", "stop_words", "stream"),
        _ASKED,
    ),
    **dict.fromkeys(("quant_method", "quant_bits"), Note("rejected", "weights are served as they are stored")),
    **dict.fromkeys(("verbose", "log_interval", "owned_by"), Note("default", "the engine says what it logs")),
}  # fmt: skip
