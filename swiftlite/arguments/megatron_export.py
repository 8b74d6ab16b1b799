"""Run settings of a model that is converted or compared, not trained: those that ms-swift's export writes weights with."""

from __future__ import annotations

from swiftlite.arguments.parallel import MegatronArguments
from swiftlite.utils.types import Config, Json


def conversion_arguments(config: Config, output_dir: str, torch_dtype: object) -> MegatronArguments:
    """Settings of one process, with the model that they are for.

    Args: config: Megatron names, as `convert_hf_config` returns them. torch_dtype: of the weights, text or object.
    """
    settings: Json = {
        "output_dir": output_dir, "torch_dtype": torch_dtype, "attention_backend": "unfused",
        "use_cpu_initialization": True, "no_save_optim": True, "no_save_rng": True, "no_load_optim": True,
        "no_load_rng": True, "moe_grouped_gemm": True if config.get("num_experts") else None,
    }  # fmt: skip
    made = MegatronArguments(**settings)
    made.apply_model_config(config)
    return made
