"""SmolLM2: small models of the LLaMA architecture with their own chat template. An example of adding a model type."""

from __future__ import annotations

from swiftlite.families import register_model
from swiftlite.families.meta.model import ModelGroup, ModelMeta, ids

SIZES = ("135M", "360M", "1.7B")

register_model(
    ModelMeta(
        "smollm2",
        (ModelGroup(ids(*(f"HuggingFaceTB/SmolLM2-{size}{kind}" for size in SIZES for kind in ("-Instruct", "")))),),
        template="smollm2",
        architectures=("LlamaForCausalLM",),
        model_arch="llama",
    )
)
