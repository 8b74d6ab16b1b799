"""Names for data from outside, whose values have whatever type a file or a caller gave them.

Who reads a value checks it: checkpoint/info.py for config.json, llm/dataset/preprocess.py for rows, arguments/parser.py
for settings.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

Json: TypeAlias = dict[str, Any]  # an object of a JSON, JSONL or YAML file, or what becomes one
Config: TypeAlias = Mapping[str, Any]  # config.json of a model or adapter_config.json, read only
Settings: TypeAlias = dict[str, Any]  # keywords of a call or fields of a dataclass, by name
