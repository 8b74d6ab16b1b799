"""The checkpoints of a run: which one it resumes from, whether that is whole, and which old ones it deletes.

Both sides of swiftlite name them PREFIX and a number. Imports no torch.
"""

from __future__ import annotations

import json
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from swiftlite.utils.errors import CheckpointError, reason
from swiftlite.utils.io import read_json, restore_directory, write_json
from swiftlite.utils.logger import get_logger

RECORD = "checkpoints.json"
_NAME = re.compile(r"(checkpoint-|iter_)[0-9]+(-hf)?")  # of what a run saves


def finished(root: Path, prefix: str) -> dict[int, Path]:
    """Step -> directory `PREFIX<digits>` in `root`, ascending. Names with anything else in them are the user's."""
    found = {}
    for path in root.glob(f"{prefix}*"):
        match = re.fullmatch(rf"{prefix}(\d+)", path.name)
        if match and path.is_dir():
            found[int(match[1])] = path
    return dict(sorted(found.items()))


@dataclass(frozen=True)
class Start:
    """The checkpoint that a run resumes from, and the one before it."""

    directory: Path
    before: Path | None

    @classmethod
    def of(cls, found: Mapping[int, Path], step: int) -> Start:
        """The one of `step` among `finished` ones."""
        earlier = [number for number in found if number < step]
        return cls(found[step], found[max(earlier)] if earlier else None)

    @property
    def step(self) -> int:
        return int(re.sub(r"\D", "", self.directory.name))

    @property
    def way_on(self) -> str:
        """What a user does whose checkpoint cannot be read."""
        then = f"resume from {self.before.name}" if self.before else "begin anew"
        return f"copy it back, or remove {self.directory} and give the same command again to {then}"

    @contextmanager
    def reading(self, file: Path | None = None) -> Iterator[None]:
        """Around whatever reads the checkpoint, or one file of it. Raises: CheckpointError with the way on."""
        try:
            yield
        except Exception as error:  # libraries raise anything from OSError to their own types
            text = reason(error)
            where = "" if str(self.directory) in text else f"{file or self.directory}: "
            raise CheckpointError(f"{where}{text}; {self.way_on}") from error

    def check(self, check_file: Callable[[Path], None] | None = None) -> None:
        """Find files that were cut off or overwritten, before anything is loaded.

        Args: check_file: looks at one more file of any name. Raises: CheckpointError naming the file and the way on.
        """
        for path in sorted(self.directory.iterdir()):
            problem = _problem(path)
            if problem is None and check_file is not None:
                with self.reading(path):
                    check_file(path)
            if problem is not None:
                raise CheckpointError(f"{path} {problem}; {self.way_on}")


def _problem(path: Path) -> str | None:
    try:
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        elif path.suffix in (".pt", ".pth", ".bin"):  # torch.save writes zip archives, their table last
            with zipfile.ZipFile(path):
                pass
    except (ValueError, RecursionError):
        return "is not valid JSON"
    except zipfile.BadZipFile:
        return "is damaged or cut off"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return None


class Record:
    """What this run has saved, in OUTPUT_DIR/checkpoints.json, the last save last: only this is ever deleted.

    Directories that were saved together (a checkpoint and its Hugging Face form) make one entry. Rank 0 only.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.saves: list[list[str]] = []
        path = root / RECORD
        try:
            if path.is_file():
                saves = [list(entry) for entry in read_json(path)["saved"]]
                if not all(saves) or not all(_NAME.fullmatch(name) for entry in saves for name in entry):
                    raise ValueError
                self.saves = saves
        except (KeyError, TypeError, ValueError):  # CheckpointError is one
            get_logger().warning("%s is damaged: checkpoints that it named will not be deleted", path)

    def saved(self, paths: Sequence[Path], limit: int | None, best: str | None) -> list[Path]:
        """Note what has just been saved, and delete the oldest saves above `limit`; `best` stays, and counts.

        The last save and the one of the highest step are never deleted. Returns: what was deleted.
        """
        names = [path.name for path in paths]
        self.saves = [entry for entry in self.saves if entry[0] != names[0] and (self.root / entry[0]).is_dir()]
        self.saves.append(names)
        self._write()
        highest = max(self.saves, key=lambda entry: int(re.sub(r"\D", "", entry[0]) or 0))
        kept = [entry for entry in self.saves if entry is self.saves[-1] or entry is highest or entry[0] == best]
        for entry in reversed(self.saves):
            if limit is None or (len(kept) < limit and entry not in kept):
                kept.append(entry)
        deleted = [self.root / name for entry in self.saves if entry not in kept for name in entry]
        self.saves = [entry for entry in self.saves if entry in kept]
        for path in deleted:
            _delete(path)
        if deleted:
            self._write()
        return deleted

    def _write(self) -> None:
        write_json(self.root / RECORD, {"saved": self.saves})


def _delete(path: Path) -> None:
    """Under another name first: what a kill leaves of it must not look like a checkpoint."""
    hidden = path.with_name(f".{path.name}.deleted")
    try:
        path.rename(hidden)
    except OSError:  # gone already
        return
    shutil.rmtree(hidden, ignore_errors=True)


def clear_unfinished(root: Path) -> None:
    """Remove what a killed run left half written or half deleted in its own folder. With the folder's lock held."""
    for old in root.glob(".*.old-*"):
        restore_directory(root / old.name[1:].rpartition(".old-")[0])
    for pattern in (".*.deleted", ".*.saving", ".saving"):
        for path in root.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)
