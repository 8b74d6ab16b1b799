"""Arguments of `swiftlite deploy`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import ClassVar

from swiftlite.arguments.base import BaseArguments, DataArguments
from swiftlite.arguments.export import McoreArguments
from swiftlite.arguments.flags import DEPLOY_NOTES
from swiftlite.arguments.infer import ONLY_TRAINING, EngineArguments
from swiftlite.arguments.parser import Note, arguments, field, specs
from swiftlite.utils.errors import UsageError
from swiftlite.utils.secrets import remember

KEY_VARIABLE = "SWIFTLITE_API_KEY"


@arguments
class DeployArguments(EngineArguments, McoreArguments, BaseArguments):
    """Deploy: an OpenAI-compatible server"""

    NOTES: ClassVar[Mapping[str, Note]] = {
        **{name: Note("rejected", "a server reads no data") for name in specs(DataArguments)},
        **{name: Note("rejected", "belongs to training") for name in ONLY_TRAINING if name != "merge_lora"},
        **DEPLOY_NOTES,
        "output_dir": Note("rejected", "what an engine needs is written to the cache, SWIFTLITE_CACHE"),
    }
    REST: ClassVar[str | None] = "engine_args"

    host: str = field("127.0.0.1", "address to listen at; 0.0.0.0: all of this machine", common=True)
    port: int = field(8000, "port to listen at", least=1, most=65535, common=True)
    api_key: str | None = field(
        None,
        f"key that clients must give; the variable {KEY_VARIABLE} keeps it out of the list of processes",
        common=True,
    )
    served_model_name: str | None = field(
        None, "what clients call what --model names (default: as its folder is called)", common=True
    )
    checkpoint: str = field("newest", "which checkpoint of a run", choices=["newest", "best"], common=True)
    dry_run: bool = field(False, "print the engine's command and start nothing", common=True)
    vllm_enforce_eager: bool = field(False, "vllm: no CUDA graphs, which start slowly and take memory")
    engine_args: list[str] = field([], "the engine's own flags; better written last, behind --")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.adapter_names = [word.partition("=")[0] if _is_named(word) else "" for word in self.adapters]
        paths = [
            word[len(name) + 1 :] if name else word
            for name, word in zip(self.adapter_names, self.adapters, strict=True)
        ]
        self.adapters = [os.path.expanduser(path) for path in paths]
        self.api_key = self.api_key or os.environ.get(KEY_VARIABLE) or None
        remember(self.api_key)
        if self.infer_backend == "lmdeploy":
            raise UsageError("--infer_backend lmdeploy: use vllm or sglang, which load adapters beside the model")

    @property
    def serves(self) -> bool:
        """Several adapters are served together."""
        return True

    @property
    def directory_kinds(self) -> dict[str, tuple[str, ...]]:
        """Of each kind: see swiftlite.cli.prepared."""
        return {}


def _is_named(word: str) -> bool:
    """`name=DIR`; a directory's path may hold a = too."""
    name = word.partition("=")[0]
    return "=" in word and "/" not in name and not os.path.exists(word)
