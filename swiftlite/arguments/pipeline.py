"""Which layers the stages of a pipeline hold. A model chunk is a stage, or with an interleaved pipeline a part of one."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from swiftlite.utils.errors import UsageError

if TYPE_CHECKING:
    from swiftlite.arguments.parallel import ParallelArguments


def layout_chunks(layout: str) -> list[str]:
    """Layers of each model chunk, in megatron-core's letters: E embedding, t a layer, m an MTP layer, L loss.

    Args: layout: `Ett|(tt|)*2,tL`: chunks between bars, `*n` repeats a letter or what is in brackets.
    Raises: UsageError for what is no such text.
    """
    text = layout.replace(",", "")
    for repeated in (r"\(([^)]+)\)\*(\d+)", r"(.)\*(\d+)"):
        text = re.sub(repeated, lambda found: found.group(1) * int(found.group(2)), text)
    if not re.fullmatch(r"E[t|]*[tm|]*L", text):
        raise UsageError(
            f"--pipeline_model_parallel_layout {layout}: write E, a t for each layer, L, and a bar between two stages: "
            "Ettt|tttt|ttL"
        )
    if "m" in text.rpartition("|")[0]:
        raise UsageError(f"--pipeline_model_parallel_layout {layout}: MTP layers (m) belong to the last stage")
    return text.split("|")


def chunk_layers(args: ParallelArguments, num_layers: int) -> tuple[int, ...]:
    """Layers of each model chunk in their order: of PP stages, stage r has chunks r, PP + r, ...

    Raises: UsageError if the layers cannot be divided as the arguments say.
    """
    pp, virtual = args.pipeline_model_parallel_size, args.num_virtual_stages_per_pipeline_rank or 1
    if args.pipeline_model_parallel_layout:
        counts = [chunk.count("t") for chunk in layout_chunks(args.pipeline_model_parallel_layout)]
        if sum(counts) != num_layers:
            raise UsageError(
                f"--pipeline_model_parallel_layout {args.pipeline_model_parallel_layout}: has {sum(counts)} layers (t), the "
                f"model {num_layers}"
            )
        return tuple(counts)
    first, last = args.decoder_first_pipeline_num_layers, args.decoder_last_pipeline_num_layers
    more = [int(args.account_for_embedding_in_pipeline_split), int(args.account_for_loss_in_pipeline_split)]
    ends = [count for count in (first, last) if count]
    layers, stages = num_layers - sum(ends) + sum(more), pp - len(ends)
    if pp > 1 and (layers < stages or (stages == 0 and layers) or (stages and layers % stages)):
        raise UsageError(
            f"--pipeline_model_parallel_size {pp}: {layers} layers cannot be divided over {stages} stages; change "
            "--decoder_first_pipeline_num_layers or --decoder_last_pipeline_num_layers"
        )
    between = layers // stages if stages else 0
    held = [first or between, *[between] * (pp - 2), last or between] if pp > 1 else [num_layers]
    if any(count % virtual for count in held):
        raise UsageError(
            f"--num_virtual_stages_per_pipeline_rank {virtual}: must divide the layers of each stage, {held}; choose "
            "another one or say what each holds with --pipeline_model_parallel_layout"
        )
    counts = [count // virtual for count in held] * virtual
    counts[0] -= more[0]
    counts[-1] -= more[1]
    return tuple(counts)
