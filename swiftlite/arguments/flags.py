"""Flags that users of other tools type and that are no fields here: accepted with the reason, or refused with it.

Together with the fields they make docs/flags.md.
"""

from __future__ import annotations

from swiftlite.arguments.parser import Note

_TEXT_ONLY = "the models here are text only, there is no vision tower"
_NO_PARALLEL = "conversion streams tensors and makes no model, so its result is the same for every layout"
_DPO = "belongs to preference training: `swiftlite dpo` or `swiftlite megatron dpo`"

# Why a field does not act, for the fields' records.
FP8 = "training in FP8 is not available yet"
OFFLOAD = "optimizer offload is not available yet"
ONLY_ADAPTERS = {"MegatronSftArguments": "with LoRA on Megatron nothing but adapters is trained"}
NO_MTP = {
    "MegatronDpoArguments": Note("rejected", "preference training has no multi-token-prediction loss; leave it out")
}
NO_CLASSES = "models that classify are not supported yet; leave it out to train one that writes text"
NO_WEIGHTS = Note("rejected", "has no effect: preview reads no weights")
AVERAGED_PAIRS = Note("default", "pairs are averaged over the global batch", allowed=("false",))

COMMON_NOTES: dict[str, Note] = {
    "lazy_tokenize": Note("default", "rows are tokenised before training, or while it runs with --streaming true"),
    "packing_num_proc": Note("default", "packing takes no time worth dividing; --dataset_num_proc divides tokenising"),
    "strict": Note("default", "--max_drop_ratio says how many rows may be unusable; 0: none", allowed=("false",)),
    "freeze_llm": Note("default", _TEXT_ONLY, allowed=("false",)),
    "freeze_vit": Note("default", _TEXT_ONLY),
    "freeze_aligner": Note("default", _TEXT_ONLY),
    "linear_decoupled_in_proj": Note("rejected", "belongs to hybrid attention models, which are not supported"),
    "quant_method": Note("rejected", "quantising is not supported; export bf16 and quantise with the tool of choice"),
    "push_to_hub": Note(
        "rejected", "push the directory afterwards: `swiftlite export --model DIR --push_to_hub true --hub_model_id ID`"
    ),
}

EXPORT_NOTES: dict[str, Note] = {
    "tensor_model_parallel_size": Note("default", _NO_PARALLEL),
    "pipeline_model_parallel_size": Note("default", _NO_PARALLEL),
    "expert_model_parallel_size": Note("default", _NO_PARALLEL),
    "expert_tensor_parallel_size": Note("default", _NO_PARALLEL),
    "context_parallel_size": Note("default", _NO_PARALLEL),
    "sequence_parallel": Note("default", _NO_PARALLEL),
    "decoder_first_pipeline_num_layers": Note("default", _NO_PARALLEL),
    "decoder_last_pipeline_num_layers": Note("default", _NO_PARALLEL),
    "mtp_num_layers": Note("default", "MTP layers of the checkpoint are always converted"),
    "save_missing_weights": Note("default", "every tensor of the source is accounted for, or the command fails"),
    "fp8_format": Note("rejected", "writing FP8 weights is not supported; export bf16"),
    "fp8_recipe": Note("rejected", "writing FP8 weights is not supported; export bf16"),
    "fp8_param_gather": Note("rejected", "writing FP8 weights is not supported; export bf16"),
}

_BATCHES = "samples are token ids before training begins, so a batch takes no time worth dividing (see data_s)"
TRAIN_NOTES: dict[str, Note] = {
    "dataloader_num_workers": Note("default", _BATCHES),
    "num_workers": Note("default", _BATCHES),
    "dataloader_persistent_workers": Note("default", _BATCHES),
    "dataloader_prefetch_factor": Note("default", _BATCHES),
    "finetune": Note("default", "a first start loads weights only, and the same command resumes its own run"),
    "rlhf_type": Note("rejected", _DPO),
    "beta": Note("rejected", _DPO),
    "loss_type": Note("rejected", _DPO),
    "rpo_alpha": Note("rejected", _DPO),
    "ref_model": Note("rejected", _DPO),
    "mcore_ref_model": Note("rejected", _DPO),
    "ref_adapters": Note("rejected", _DPO),
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

DPO_NOTES: dict[str, Note] = {
    "mcore_ref_model": Note("rejected", "the reference is a Hugging Face model here: give it with --ref_model"),
    "ref_adapters": Note(
        "rejected", "merge the adapter with `swiftlite export --merge_lora true` and give --ref_model"
    ),
    "calculate_per_token_loss": AVERAGED_PAIRS,
}
