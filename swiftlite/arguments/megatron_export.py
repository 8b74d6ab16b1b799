"""The MegatronArguments of a conversion: the model's config plus the fixed settings under which weights are written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from swiftlite.arguments.export import ExportArguments
from swiftlite.arguments.parallel import MegatronArguments
from swiftlite.arguments.parser import specs


def conversion_arguments(
    config: Mapping[str, Any], output_dir: str, torch_dtype: Any, args: ExportArguments | None = None
) -> MegatronArguments:
    """MegatronArguments of a model that is converted, not trained.

    Args:
        config: Megatron names, as `convert_hf_config` returns them.
        torch_dtype: dtype of the weights that are written, text or object.
        args: the command's arguments; settings that both have (the seed, say) are taken from there.
    """
    shared: dict[str, Any] = {}
    if args is not None:
        shared = {n: getattr(args, n) for n in ("seed",) if n in specs(type(args))}
    made = MegatronArguments(
        **shared,
        output_dir=output_dir,
        torch_dtype=torch_dtype,
        attention_backend="unfused",
        use_cpu_initialization=True,
        no_save_optim=True,
        no_save_rng=True,
        no_load_optim=True,
        no_load_rng=True,
        moe_grouped_gemm=True if config.get("num_experts") else None,
    )
    made.apply_model_config(config)
    return made
