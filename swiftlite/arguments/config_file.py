"""Config files: settings as one YAML or JSON mapping, read in place of flags and written from them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping

from swiftlite.utils.errors import UsageError
from swiftlite.utils.logger import get_logger
from swiftlite.utils.types import Json


def read_config_file(path: str) -> Json:
    """Read a YAML or JSON file that holds one mapping of setting -> value; of args.json of a run, what was given to it.

    Raises: UsageError naming the file if it is missing, malformed or not a mapping.
    """
    path = os.path.expanduser(path)
    if not os.path.isfile(path):
        raise UsageError(f"{path}: no such config file; a command takes [config.yaml|config.json] [--flag value ...]")
    with open(path, encoding="utf-8") as file:
        text = file.read()
    try:
        if path.endswith(".json"):
            data = json.loads(text)
        else:
            import yaml

            data = yaml.safe_load(text)
    except Exception as error:  # the two readers' errors have no common base
        raise UsageError(f"{path}: cannot be read as {'JSON' if path.endswith('.json') else 'YAML'}: "
                         f"{' '.join(str(error).split())}") from None  # fmt: skip
    if data is None:
        return {}
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise UsageError(f"{path}: must hold one mapping of setting to value at the top")
    if isinstance(data.get("given"), list) and "swiftlite_version" in data:  # args.json of a run: the rest was settled
        data = {key: data[key] for key in data["given"] if data.get(key) is not None}
    return {key.lstrip("-").replace("-", "_"): value for key, value in data.items()}


def write_config_file(path: str, values: Mapping[str, object]) -> None:
    """Write settings as YAML, or as JSON where the name ends so."""
    if path.endswith(".json"):
        text = json.dumps(values, indent=2)
    else:
        import yaml

        text = yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True)
    from pathlib import Path  # commands that write none start without these

    from swiftlite.utils.io import write_text_atomic

    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomic(target, text)
    get_logger().info("wrote %s", path)
