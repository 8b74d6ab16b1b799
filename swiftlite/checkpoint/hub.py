"""Turns what the user calls a model (local directory, ModelScope id, Hugging Face id) into a local directory, and pushes
a directory to a hub.

The hub clients are imported only when something has to be downloaded.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from swiftlite.checkpoint.files import published_files
from swiftlite.utils.errors import CheckpointError, UsageError
from swiftlite.utils.logger import get_logger
from swiftlite.utils.text import one_line

logger = get_logger()

# Formats that transformers does not load from such a directory; they can be as large as the weights themselves.
FOREIGN_FILES = ("*.zip", "*.gguf", "*.pth", "*.pt", "consolidated*", "onnx/*", "*.onnx", "*.msgpack", "*.h5", "*.ot")
WEIGHT_FILES = ("*.safetensors", "*.bin")

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# Hugging Face writes models--ORG--NAME/snapshots/COMMIT, ModelScope models/ORG--NAME/snapshots/REVISION.
_CACHE_NAME = re.compile(r"(?:models--)?[^/]+?--([^/]+)/snapshots/")


def model_name(model_id_or_path: str) -> str:
    """The lower-case name by which a model is matched: the last path component, with both hubs' cache escapes undone.

    `.../models--ORG--NAME/snapshots/HASH` (Hugging Face cache) gives NAME; ModelScope writes `.` as `___`.
    """
    path = str(model_id_or_path)
    if os.path.isdir(path):
        path = os.path.abspath(path)
    path = path.replace(os.sep, "/").rstrip("/")
    cached = _CACHE_NAME.search(path + "/")
    name = cached.group(1) if cached else path.rsplit("/", 1)[-1]
    return name.replace("___", ".").lower()


def _has_weights(directory: str) -> bool:
    return any(any(Path(directory).glob(pattern)) for pattern in WEIGHT_FILES)


def _glob(pattern: str) -> str:
    """Registry records may write file patterns as regular expressions; the hub clients take shell patterns."""
    return pattern.rstrip("$").replace(".+", "*").replace(".*", "*").replace("\\.", ".")


def _download(
    model_id: str, use_hf: bool, revision: str | None, ignore: list[str], token: str | None, local_only: bool
) -> str:
    """Call the hub's own client, which keeps what it has downloaded in its own cache."""
    client = import_module("huggingface_hub" if use_hf else "modelscope")
    return str(
        client.snapshot_download(
            model_id, revision=revision, ignore_patterns=ignore, token=token, local_files_only=local_only
        )
    )


def local_directory(model_id_or_path: str, flag: str = "model") -> str | None:
    """The absolute path of a directory that exists, None for a hub id. Raises: UsageError for what is neither."""
    path = os.path.expanduser(str(model_id_or_path))
    if os.path.isdir(path):
        return os.path.abspath(path)
    if os.path.isfile(path):
        raise UsageError(f"--{flag} {model_id_or_path} is a file; give the directory that holds config.json")
    if not _HUB_ID.fullmatch(path):
        raise UsageError(
            f"--{flag} {model_id_or_path}: no such directory, and not a hub id of the form ORGANISATION/NAME; "
            "check the path"
        )
    return None


def fetch(
    model_id_or_path: str,
    *,
    use_hf: bool = False,
    revision: str | None = None,
    download_model: bool = True,
    ignore_patterns: Sequence[str] | None = None,
    token: str | None = None,
) -> str:
    """Return the local directory of a model, downloading it first where it is a hub id.

    Args: download_model: False leaves the weight files on the hub. ignore_patterns: more file names to leave there.
    Raises: UsageError for a path that does not exist, CheckpointError where the hub cannot be reached.
    """
    local = local_directory(model_id_or_path)
    if local is not None:
        return local
    path = str(model_id_or_path)
    hub = "Hugging Face" if use_hf else "ModelScope"
    ignore = [*FOREIGN_FILES, *map(_glob, ignore_patterns or ())]
    if not download_model:
        ignore += WEIGHT_FILES
    other = "leave out --use_hf (ModelScope)" if use_hf else "add --use_hf true (Hugging Face)"
    advice = f"check the id and the network, {other}, or give a local directory"
    logger.info("getting %s from %s", path, hub)
    try:
        directory = _download(path, use_hf, revision, ignore, token, local_only=False)
    except Exception as error:  # the clients raise anything from OSError to their own types
        reason = one_line(error)
        try:  # a machine without network still uses what an earlier run has downloaded
            directory = _download(path, use_hf, revision, ignore, token, local_only=True)
        except Exception:
            directory = ""
        if not directory or not os.path.isfile(os.path.join(directory, "config.json")):
            raise CheckpointError(f"could not download {path} from {hub}: {reason}; {advice}") from error
        logger.warning("%s cannot be reached (%s); using the copy of %s in its cache", hub, reason, path)
    # Without network the clients may answer with what they have, be it only the config.
    if download_model and not _has_weights(directory):
        raise CheckpointError(
            f"could not download {path} from {hub}: {directory} holds neither .safetensors nor .bin files; {advice}"
        )
    return directory


def push(
    directory: str | Path,
    model_id: str | None,
    *,
    use_hf: bool = False,
    token: str | None = None,
    private: bool = False,
) -> None:
    """Upload a model directory, one file after the other: weights first, config.json and the index last.

    Both hubs keep files by their hash, so the same call after an interruption sends only what is not there yet, and a
    repository is complete as soon as it can be loaded.
    Raises: UsageError for an id of the wrong form; CheckpointError naming the file that could not be sent.
    """
    check_hub_id(model_id)
    hub = "Hugging Face" if use_hf else "ModelScope"
    client = import_module("huggingface_hub" if use_hf else "modelscope.hub.api")
    api = (client.HfApi if use_hf else client.HubApi)(token=token)
    files = sorted(
        (file.relative_to(directory).as_posix() for file in published_files(Path(directory))), key=_push_order
    )
    total, step = len(files), "create the repository"
    try:
        if use_hf:
            api.create_repo(model_id, private=private, exist_ok=True)
        else:
            api.create_repo(model_id, visibility="private" if private else "public", exist_ok=True, token=token)
        for number, file in enumerate(files, start=1):
            step = f"send {file}"
            logger.info("pushing %s to %s (%d of %d)", file, hub, number, total)
            api.upload_file(path_or_fileobj=str(Path(directory, file)), path_in_repo=file, repo_id=model_id, token=token,
                            commit_message=f"Upload {file}")  # fmt: skip
    except Exception as error:  # the clients raise anything from OSError to their own types
        reason = one_line(error)
        flags = f"{' --use_hf true' if use_hf else ''}{' --hub_private_repo true' if private else ''}"
        raise CheckpointError(
            f"could not {step} in {model_id} on {hub}: {reason}; {directory} is complete, push it again with `swiftlite "
            f"export --model {shlex.quote(str(directory))} --push_to_hub true --hub_model_id {model_id}{flags}`"
            f"{' and the same --hub_token' if token else ''}"
        ) from error
    logger.info("pushed %d files to %s on %s", total, model_id, hub)


def check_hub_id(model_id: str | None) -> None:
    """Raises: UsageError if this is not an id that something can be pushed to."""
    if model_id is None or not _HUB_ID.fullmatch(model_id):
        raise UsageError(f"--hub_model_id {model_id}: must have the form ORGANISATION/NAME")


def _push_order(file: str) -> tuple[bool, bool, str]:
    return file == "config.json", file.endswith(".index.json"), file
