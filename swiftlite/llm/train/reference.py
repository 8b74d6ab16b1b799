"""The reference model of preference training with transformers."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch

from swiftlite.arguments.preference import DpoArguments
from swiftlite.llm.model.loader import embedding_rows, get_model_tokenizer
from swiftlite.llm.pipeline import load_model
from swiftlite.train.reference import check_reference, reference_kind

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def reference_model(args: DpoArguments, model: PreTrainedModel) -> PreTrainedModel | None:
    """The frozen reference before `model` is changed; None where adapters are switched off, or the loss has none.

    Raises: UsageError as reference_kind, check_reference.
    """
    kind = reference_kind(args)
    if kind in ("none", "adapters off"):
        return None
    reference: PreTrainedModel
    if kind == "start":
        # Ranks that divide it share the memory of what is read, not of a copy.
        reference = load_model(args) if args.fsdp else copy.deepcopy(model)
    else:
        reference, _ = get_model_tokenizer(
            str(args.ref_model), args.model_info.torch_dtype, args.device_map, use_hf=args.use_hf, need_template=False,
            attn_impl=args.hf_attn_implementation, trust_remote_code=args.trust_remote_code, hub_token=args.hub_token,
            ignore_requirements=args.ignore_requirements, new_special_tokens=args.new_special_tokens,
        )  # fmt: skip
        check_reference(args, embedding_rows(reference), embedding_rows(model))
    if not args.adapts:
        _round_like_trained(reference)
    for config in (reference.config, reference.config.get_text_config()):
        config.use_cache = False
    return reference.requires_grad_(False).eval()


def _round_like_trained(reference: PreTrainedModel) -> None:
    """The policy's weights are held in fp32 and its matrices run by autocast; equal weights must give equal numbers here.

    So everything but the matrices is held in fp32 as well; those are rounded to what autocast makes of the policy's.
    """
    matrices = {id(m.weight) for m in reference.modules() if isinstance(m, torch.nn.Linear)}
    for parameter in reference.parameters():
        is_matrix = id(parameter) in matrices or parameter.dim() == 3
        if parameter.dtype in (torch.bfloat16, torch.float16) and not is_matrix:
            parameter.data = parameter.data.float()
