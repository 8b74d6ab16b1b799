"""Where a conversion works: resumption, locks, what is kept and what is removed."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest

from swiftlite.utils.errors import CheckpointError, MapError, UsageError
from swiftlite.weights.journal import Journal, fingerprint, workspace


def prepare(directory: Path) -> None:
    (directory / "data").write_bytes(b"fresh")


def hidden(tmp_path: Path) -> list[str]:
    return sorted(p.name for p in tmp_path.iterdir() if p.name.startswith("."))


def test_output_appears_only_at_the_end(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with workspace(out, False, lambda: "a", prepare) as space:
        assert not space.resumed and not out.exists()
        (space.directory / "data").write_bytes(b"done")
    assert [p.name for p in out.iterdir()] == ["data"] and (out / "data").read_bytes() == b"done"
    assert hidden(tmp_path) == []


def test_an_io_error_keeps_the_work_and_the_same_conversion_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(OSError, match="disk"), workspace(out, False, lambda: "a", prepare) as space:
        (space.directory / "data").write_bytes(b"half")
        space.journal.write(space.journal.add("job", 1, {"x": "1"}) or space.journal.take())
        raise OSError("disk full")
    assert not out.exists() and hidden(tmp_path) == [".out.partial"]
    with workspace(out, False, lambda: "a", prepare) as space:
        assert space.resumed and space.journal.done == {"job": {"x": "1"}}
        assert (space.directory / "data").read_bytes() == b"half"


def test_another_conversion_starts_over(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(OSError, match="x"), workspace(out, False, lambda: "a", prepare) as space:
        (space.directory / "data").write_bytes(b"half")
        raise OSError("x")
    with workspace(out, False, lambda: "b", prepare) as space:
        assert not space.resumed and space.journal.done == {}
        assert (space.directory / "data").read_bytes() == b"fresh"


def test_a_mistake_in_the_input_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(MapError), workspace(tmp_path / "out", False, lambda: "a", prepare):
        raise MapError("unknown tensor")
    assert list(tmp_path.iterdir()) == []


def test_a_source_that_changes_is_noticed(tmp_path: Path) -> None:
    identities = iter("ab")
    with pytest.raises(CheckpointError, match="changed while it was read"):
        with workspace(tmp_path / "out", False, lambda: next(identities), prepare):
            pass
    assert list(tmp_path.iterdir()) == []


def test_fingerprint_sees_size_time_and_options(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_text("1")
    first = fingerprint([path], ["x"])
    assert fingerprint([path], ["x"]) == first != fingerprint([path], ["y"])
    path.write_text("2")
    assert fingerprint([path], ["x"]) != first


def test_existing_output(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").touch()
    with pytest.raises(UsageError, match="exists already"), workspace(out, False, lambda: "a", prepare):
        pass
    with workspace(out, True, lambda: "a", prepare):
        assert (out / "mine").exists()
    assert [p.name for p in out.iterdir()] == ["data"]


def _hold(out: Path, ready: object, release: object) -> None:
    with workspace(out, False, lambda: "a", prepare):
        ready.set()  # type: ignore[attr-defined]
        release.wait(30)  # type: ignore[attr-defined]


def test_two_processes_cannot_write_one_output(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    ready, release = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(tmp_path / "out", ready, release))
    process.start()
    assert ready.wait(30)
    with pytest.raises(UsageError, match="another swiftlite process is writing"):
        with workspace(tmp_path / "out", False, lambda: "a", prepare):
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
