"""Module names of release 0.1 that scripts import, and where what they held stands now. They go with the next release.

Kept out of the modules themselves: nothing in swiftlite imports an old name.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED = {
    "swiftlite.llm.argument": "swiftlite.arguments",
    "swiftlite.llm.argument.base": "swiftlite.arguments.base",
    "swiftlite.llm.argument.export": "swiftlite.arguments.export",
    "swiftlite.llm.argument.infer": "swiftlite.arguments.infer",
    "swiftlite.llm.argument.rlhf": "swiftlite.arguments.preference",
    "swiftlite.llm.argument.sft": "swiftlite.arguments.train",
    "swiftlite.llm.dataset.order": "swiftlite.train.order",
    "swiftlite.llm.model.hub": "swiftlite.checkpoint.hub",
    "swiftlite.llm.plot": "swiftlite.train.plot",
    "swiftlite.llm.train.metrics": "swiftlite.train.metrics",
    "swiftlite.megatron.model.hf_config": "swiftlite.checkpoint.bind",
    "swiftlite.utils.parser": "swiftlite.arguments.parser",
}


class MovedModules:
    """Gives the module of the new name for an old one. No base class: `importlib.abc` takes longer than all of this."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in MOVED else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        import warnings

        warnings.warn(f"{spec.name} is {MOVED[spec.name]} now", DeprecationWarning, stacklevel=2)
        module = import_module(MOVED[spec.name])
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """The module has run; the import system has given it the old name's spec."""
        spec = module.__spec__
        if spec is not None and isinstance(spec.loader_state, ModuleSpec):
            module.__spec__ = spec.loader_state


sys.meta_path.insert(0, MovedModules())
