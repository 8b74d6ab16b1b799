"""Where a conversion works: resumption, locks, what is kept and what is removed."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from swiftlite.utils.errors import BudgetError, CheckpointError, MapError, UncheckedError, UsageError
from swiftlite.utils.output import MARKED, check_output
from swiftlite.weights.journal import Journal, fingerprint, workspace


def prepare(directory: Path) -> None:
    (directory / "data").write_bytes(b"fresh")


def work(out: Path, exist_ok: bool, identity: Callable[[], str], prepare: Callable[[Path], None]) -> Any:
    return workspace(out, partial(check_output, out, "model", exist_ok), "model", identity, prepare)


def hidden(tmp_path: Path) -> list[str]:
    return sorted(p.name for p in tmp_path.iterdir() if p.name.startswith("."))


def test_output_appears_only_at_the_end(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with work(out, False, lambda: "a", prepare) as space:
        assert not space.resumed and not out.exists()
        (space.directory / "data").write_bytes(b"done")
    assert {p.name for p in out.iterdir()} == {"data", MARKED} and (out / "data").read_bytes() == b"done"
    assert hidden(tmp_path) == []


def test_an_io_error_keeps_the_work_and_the_same_conversion_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(OSError, match="disk"), work(out, False, lambda: "a", prepare) as space:
        (space.directory / "data").write_bytes(b"half")
        space.journal.write(space.journal.add("job", 1, {"x": "1"}) or space.journal.take())
        raise OSError("disk full")
    assert not out.exists() and hidden(tmp_path) == [".out.partial"]
    with work(out, False, lambda: "a", prepare) as space:
        assert space.resumed and space.journal.done == {"job": {"x": "1"}}
        assert (space.directory / "data").read_bytes() == b"half"


def test_another_conversion_starts_over(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(OSError, match="x"), work(out, False, lambda: "a", prepare) as space:
        (space.directory / "data").write_bytes(b"half")
        raise OSError("x")
    with work(out, False, lambda: "b", prepare) as space:
        assert not space.resumed and space.journal.done == {}
        assert (space.directory / "data").read_bytes() == b"fresh"


def test_a_mistake_in_the_input_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(MapError), work(tmp_path / "out", False, lambda: "a", prepare):
        raise MapError("unknown tensor")
    assert list(tmp_path.iterdir()) == []


def test_a_source_that_changes_is_noticed(tmp_path: Path) -> None:
    identities = iter("ab")
    with pytest.raises(CheckpointError, match="changed while it was read"):
        with work(tmp_path / "out", False, lambda: next(identities), prepare):
            pass
    assert list(tmp_path.iterdir()) == []


def test_fingerprint_is_of_content_and_options(tmp_path: Path) -> None:
    """Its first line binds the journal: times do not count, what describes the tensors does."""
    path = tmp_path / "f"
    path.write_text("1")
    first = fingerprint([path], ["x"])
    assert fingerprint([path], ["x"]) == first
    assert fingerprint([path], ["y"]).split("\n")[0] != first.split("\n")[0]
    os.utime(path, (1, 1))
    touched = fingerprint([path], ["x"])
    assert touched.split("\n")[0] == first.split("\n")[0] and touched != first
    path.write_text("2")
    os.utime(path, (1, 1))
    assert fingerprint([path], ["x"]).split("\n")[0] != first.split("\n")[0]


def test_only_an_output_of_the_same_kind_with_nothing_else_in_it_is_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with work(out, False, lambda: "a", prepare):
        pass
    with pytest.raises(UsageError, match="exists already"), work(out, False, lambda: "a", prepare):
        pass
    with pytest.raises(UsageError, match="holds 'model', not 'adapter'"):
        check_output(out, "adapter", True)
    (out / "notes").mkdir()
    with pytest.raises(UsageError, match="also holds notes, which it did not write"):
        check_output(out, "model", True)
    (out / "notes").rmdir()
    with pytest.raises(UncheckedError, match="also holds late.*is kept in .*/.out.partial"):
        with work(out, True, lambda: "a", prepare):
            (out / "late").touch()  # hours later: replacing it would delete this
    (out / "late").unlink()
    with work(out, True, lambda: "a", prepare) as space:
        assert space.resumed


def test_what_stands_in_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    foreign, model = tmp_path / "foreign", tmp_path / "all" / "model"
    foreign.mkdir()
    (foreign / "mine").touch()
    model.mkdir(parents=True)
    (tmp_path / "link").symlink_to("all")
    for mark in (None, "{", "[1]", "{}", '{"output": 3}', '{"output": {"kind": "model", "files": 3}}'):
        if mark is not None:
            (foreign / MARKED).write_text(mark)
        with pytest.raises(UsageError, match="replaces only what such a command wrote"):
            check_output(foreign, "model", True)
    for path in (model, tmp_path / "all", tmp_path / "link", tmp_path):
        with pytest.raises(UsageError, match="holds .*model, which is read"):
            check_output(path, "model", True, [model])
    monkeypatch.chdir(model)
    for path in (Path("."), Path(".."), model, tmp_path):
        with pytest.raises(UsageError, match="is the working directory or holds it"):
            check_output(path, "model", True)
    with pytest.raises(UsageError, match="whole file system"):
        check_output(Path("/proc"), "model", True)


def test_unfinished_files_count_as_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=100_000))
    with pytest.raises(BudgetError, match="needs 150.0 kB, its disk has 100.0 kB free"):
        check_output(tmp_path / "out", "model", needed=150_000)
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial/data").write_bytes(b"x" * 80_000)
    check_output(tmp_path / "out", "model", needed=150_000)
    with (tmp_path / ".out.partial/data").open("wb") as file:
        file.truncate(80_000)  # a hole takes no room
    with pytest.raises(BudgetError):
        check_output(tmp_path / "out", "model", needed=150_000)


def test_a_link_is_written_through(tmp_path: Path) -> None:
    (tmp_path / "disk" / "big").mkdir(parents=True)
    (tmp_path / "out").symlink_to("disk/big")
    with work(tmp_path / "out", False, lambda: "a", prepare) as space:
        assert space.directory.parent == tmp_path / "disk"
    assert (tmp_path / "out").is_symlink() and (tmp_path / "disk/big/data").is_file()
    assert hidden(tmp_path) == hidden(tmp_path / "disk") == []


def test_a_check_that_cannot_run_keeps_the_work(tmp_path: Path) -> None:
    with pytest.raises(UncheckedError), work(tmp_path / "out", False, lambda: "a", prepare) as space:
        space.journal.write([("job", {"x": "1"})])
        raise UncheckedError("no transformers")
    with work(tmp_path / "out", False, lambda: "a", prepare) as space:
        assert space.resumed and set(space.journal.done) == {"job"}


def test_a_rename_that_fails_puts_the_old_output_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, rename = tmp_path / "out", Path.rename
    with work(out, False, lambda: "a", prepare):
        pass
    before = (out / "data").stat().st_ino

    def busy(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            raise OSError(16, "Device or resource busy", str(self))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", busy)
    with pytest.raises(OSError, match="busy"), work(out, True, lambda: "b", prepare) as space:
        space.journal.write([("job", {"x": "1"})])
    assert (out / "data").stat().st_ino == before and hidden(tmp_path) == [".out.partial"]
    monkeypatch.undo()
    with work(out, True, lambda: "b", prepare) as space:
        assert space.resumed and set(space.journal.done) == {"job"}
    assert (out / "data").stat().st_ino != before and hidden(tmp_path) == []


def test_what_a_kill_between_two_renames_left_is_put_right(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with work(out, False, lambda: "a", prepare):
        pass
    out.rename(tmp_path / ".out.old-1")
    (tmp_path / ".out.partial").mkdir()  # finished, its journal moved aside
    (tmp_path / ".out.conversion-state").mkdir()
    (tmp_path / ".out.conversion-state/identity").write_text("b")
    with pytest.raises(UsageError, match="exists already"), work(out, False, lambda: "b", prepare):
        pass  # seen only under the lock
    (tmp_path / ".out.old-2").mkdir()  # the renaming was over, the old one not deleted
    with work(out, True, lambda: "b", prepare) as space:
        assert space.resumed
    assert hidden(tmp_path) == []


def _hold(out: Path, ready: object, release: object) -> None:
    with work(out, False, lambda: "a", prepare):
        ready.set()  # type: ignore[attr-defined]
        release.wait(30)  # type: ignore[attr-defined]


def test_two_processes_cannot_write_one_output(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    ready, release = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(tmp_path / "out", ready, release))
    process.start()
    assert ready.wait(30)
    with pytest.raises(UsageError, match="another swiftlite process is writing"):
        with work(tmp_path / "out", False, lambda: "a", prepare):
            pass
    release.set()
    process.join()
    assert process.exitcode == 0 and (tmp_path / "out/data").is_file()


def test_a_line_that_was_cut_short_is_left_out(tmp_path: Path) -> None:
    journal = Journal(tmp_path, 0)
    journal.write([("one", {}), ("two", {})])
    journal.close()
    path = tmp_path / "journal-0.jsonl"
    path.write_text(path.read_text()[:-9])
    again = Journal(tmp_path, 0)
    assert set(again.done) == {"one"}
    again.write([("three", {})])
    again.close()
    assert set(Journal(tmp_path, 1).done) == {"one", "three"}
