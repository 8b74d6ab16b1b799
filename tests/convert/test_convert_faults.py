"""Conversions that are killed, run out of disk, or are shared by several processes; and the bitwise check."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from swiftlite.checkpoint.bind import bind_map
from swiftlite.checkpoint.checkpoint import Checkpoint
from swiftlite.cli.main import main
from swiftlite.convert import conversion as convert
from swiftlite.convert import execute
from swiftlite.convert.mcore import McoreTarget
from swiftlite.weights import journal, stream
from tests.dist.launch import run_cases
from tests.families.cases import config_of

CONFIG = {
    **config_of("glm4_5:default"), "hidden_size": 256, "moe_intermediate_size": 512, "n_routed_experts": 16,
    "num_hidden_layers": 6, "intermediate_size": 1024, "vocab_size": 4001,
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 170 MB in eight shards with an index, random weights."""
    directory = tmp_path_factory.mktemp("faults") / "GLM-4.5-Air"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(CONFIG))
    bound = bind_map(CONFIG, with_mtp=True)
    shards: list[dict[str, torch.Tensor]] = [{} for _ in range(8)]
    for i, (name, (entry, position)) in enumerate(bound.by_hf.items()):
        shards[i * 8 // len(bound.by_hf)][name] = torch.randn(entry.hf_shapes[position]) * 0.05
    weights = {k: v for shard in shards for k, v in shard.items()}
    for duplicate in bound.duplicates:
        if duplicate.name != "lm_head.weight":
            shards[7][duplicate.name] = weights[duplicate.of].clone()
    weight_map = {}
    for i, shard in enumerate(shards):
        save_file(shard, directory / f"model-{i}.safetensors", {"format": "pt"})
        weight_map |= dict.fromkeys(shard, f"model-{i}.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


def to_mcore(model: Path, out: Path, *flags: str) -> int:
    return main(["export", "--model", str(model), "--to_mcore", "true", "--output_dir", str(out), *flags])


def to_hf(mcore: Path, out: Path, *flags: str) -> int:
    return main(["export", "--mcore_model", str(mcore), "--to_hf", "true", "--output_dir", str(out), *flags])


def assert_same_model(a: Path, b: Path) -> None:
    shards = sorted(p.name for p in a.glob("*.safetensors"))
    assert shards == sorted(p.name for p in b.glob("*.safetensors"))
    for name in shards:
        assert (a / name).read_bytes() == (b / name).read_bytes(), name


def run_killed(command: list[str], out: Path, kills: int, moments: random.Random) -> int:
    """Run a command in other processes, which are killed at random moments, until one ends by itself after `kills`.

    Returns: how many were killed before they had ended.
    """
    killed = 0
    for attempt in range(kills + 1):
        child = os.fork()
        if child == 0:
            try:
                torch.set_num_threads(1)  # the others are not there after a fork
                os._exit(main(command))
            finally:
                os._exit(1)
        if attempt < kills:
            time.sleep(moments.uniform(0.02, 0.35))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            assert os.WEXITSTATUS(status) == 0, status
            break
        killed += 1
        assert not out.exists(), "a killed run left something that looks finished"
    return killed


@pytest.mark.faults
def test_killed_at_random_moments_both_ways(model: Path, tmp_path: Path) -> None:
    killed = {"mcore": 0, "back": 0}
    for seed in range(20):
        mcore, back = tmp_path / f"mcore{seed}", tmp_path / f"back{seed}"
        for out, words in (
            (mcore, ["--model", str(model), "--to_mcore", "true"]),
            (back, ["--mcore_model", str(mcore), "--to_hf", "true"]),
        ):
            command = ["export", *words, "--output_dir", str(out), "--verify", "bitwise"]
            killed[out.name.rstrip("0123456789")] += run_killed(command, out, 5, random.Random(seed))
        assert_same_model(model, back)
        assert not list(tmp_path.glob(".*"))
        shutil.rmtree(mcore)
        shutil.rmtree(back)
        if min(killed.values()) >= 20:
            break
    assert min(killed.values()) >= 20, killed


@pytest.mark.dist
@pytest.mark.parametrize("processes", [2, 4])
def test_several_processes_share_the_files(model: Path, tmp_path: Path, processes: int) -> None:
    mcore, back, alone = tmp_path / "mcore", tmp_path / "back", tmp_path / "alone"
    files = ["--thread_count", "4"]
    assert to_mcore(model, alone, *files) == 0
    there = ["--model", str(model), "--to_mcore", "true", "--output_dir", str(mcore), *files]
    if processes == 2:  # one of them makes the check, while the other waits
        there += ["--test_convert_precision", "true"]
    again = ["--mcore_model", str(mcore), "--to_hf", "true", "--output_dir", str(back)]
    cases = [{"command": "export", "argv": [*words, "--verify", "bitwise"]} for words in (there, again)]
    code, log = run_cases(processes, cases)
    assert code == 0, log[-2000:]
    assert_same_model(model, back)
    written = sorted(p.relative_to(alone) for p in alone.rglob("*") if p.is_file() and p.name != "args.json")
    assert len([p for p in written if p.suffix == ".distcp"]) == 4 and Path("iter_0000001/.metadata") in written
    for path in written:
        assert (mcore / path).read_bytes() == (alone / path).read_bytes(), path


def test_work_is_divided_by_whole_files_and_bytes(model: Path, tmp_path: Path) -> None:
    plan = McoreTarget(num_files=5).plan(Checkpoint.open(model))
    jobs = plan.jobs(tmp_path)
    parts = [execute.share(jobs, rank, 3) for rank in range(3)]
    assert sum(len(p) for p in parts) == len(jobs)
    files = [{job.file for job in part} for part in parts]
    assert not files[0] & files[1] and not files[0] & files[2] and not files[1] & files[2]
    sizes = [sum(job.nbytes for job in part) for part in parts]
    assert max(sizes) <= 2.2 * min(sizes)  # five files over three processes


def test_bitwise_check_sees_a_byte_that_the_disk_changed(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = convert.verify_bitwise

    def after_damage(written: object, *args: object) -> None:
        (extent, *_) = written.extents("model.layers.3.mlp.experts.7.up_proj.weight", 400, 404)  # type: ignore[attr-defined]
        with extent.file.open("r+b") as file:
            file.seek(extent.offset)
            byte = file.read(1)[0]
            file.seek(extent.offset)
            file.write(bytes([byte ^ 1]))
        original(written, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(convert, "verify_bitwise", after_damage)
    assert to_mcore(model, tmp_path / "mcore", "--verify", "bitwise") == 1
    assert "model.layers.3.mlp.experts.7.up_proj.weight reads back with other bytes" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def _fill_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """The 40th write finds no space."""
    original, left = stream.Files.write, [40]

    def write(self: object, path: Path, offset: int, buffer: memoryview) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise OSError(28, "No space left on device")
        original(self, path, offset, buffer)  # type: ignore[arg-type]

    monkeypatch.setattr(stream.Files, "write", write)


def _change_weights(model: Path) -> None:
    """Some bytes of every tensor; headers, sizes and times stay."""
    for path in model.glob("*.safetensors"):
        times, data = path.stat(), bytearray(path.read_bytes())
        for place in range(8 + int.from_bytes(data[:8], "little"), len(data), 16):
            data[place] ^= 1
        path.write_bytes(data)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_a_journal_of_other_weights_is_not_gone_on_with(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _fill_the_disk(monkeypatch)
    monkeypatch.setattr(journal, "FLUSH_BYTES", 1)
    assert to_mcore(model, tmp_path / "mcore") == 1
    assert len((tmp_path / ".mcore.partial/conversion-state/journal-0.jsonl").read_text().splitlines()) > 20
    _change_weights(model)
    assert to_mcore(model, tmp_path / "mcore") == 0
    assert main(["verify", str(model), str(tmp_path / "mcore")]) == 0


def test_bitwise_check_reads_the_source_again(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = convert.verify_bitwise

    def after_change(*args: Any) -> None:
        _change_weights(model)
        original(*args)

    monkeypatch.setattr(convert, "verify_bitwise", after_change)
    assert to_mcore(model, tmp_path / "mcore", "--verify", "bitwise") == 1
    assert "the source holds other bytes than those that were converted" in capsys.readouterr().err


def test_disk_full_keeps_the_work(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _fill_the_disk(monkeypatch)
    monkeypatch.setattr("swiftlite.weights.journal.FLUSH_BYTES", 1 << 20)
    assert to_mcore(model, tmp_path / "mcore") == 1
    assert "No space left on device" in capsys.readouterr().err
    assert not (tmp_path / "mcore").exists()
    assert to_mcore(model, tmp_path / "mcore") == 0
    assert "resuming the unfinished conversion" in capsys.readouterr().err
    assert to_hf(tmp_path / "mcore", tmp_path / "back") == 0
    assert_same_model(model, tmp_path / "back")


def test_memory_budget_is_refused_or_kept(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert to_mcore(model, tmp_path / "mcore", "--max_memory", "1000") == 1
    assert "--max_memory" in capsys.readouterr().err
    assert to_mcore(model, tmp_path / "mcore", "--max_memory", "2MB") == 0
    assert to_hf(tmp_path / "mcore", tmp_path / "back", "--max_memory", "2MB") == 0
    assert_same_model(model, tmp_path / "back")


def test_source_that_changes_during_the_run(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = convert.run_jobs

    def run(*args: object) -> dict[str, str]:
        hashes = original(*args)  # type: ignore[arg-type]
        os.utime(model / "model-3.safetensors")
        return hashes

    monkeypatch.setattr(convert, "run_jobs", run)
    assert to_mcore(model, tmp_path / "mcore") == 1
    assert "the source changed while it was read" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
