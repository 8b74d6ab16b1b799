"""No access token in what is printed, logged or written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from swiftlite.arguments.train import SftArguments
from swiftlite.checkpoint import hub
from swiftlite.cli.main import main
from swiftlite.plan.layouts import command
from swiftlite.train.run_directory import prepare
from swiftlite.utils.errors import CheckpointError
from swiftlite.utils.logger import get_logger
from swiftlite.utils.secrets import redact

TOKEN = "a-token-of-no-known-form"


@pytest.mark.parametrize("words", [["--hub_token", TOKEN], [f"--hub-token={TOKEN}"]])
def test_errors_hide_what_was_typed(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for flag in (["--lr", TOKEN], ["--debug", "true", "--lr", TOKEN]):
        assert main(["sft", *words, *flag]) == 2
        text = capsys.readouterr().err
        assert "***" in text and TOKEN not in text


def test_logs_hide_the_environments_and_what_looks_like_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    get_logger().warning("%s, hf_%s, ms-12345678-1234-1234-1234-123456789012", "key 0123456789abcdef", "A1" * 10)
    get_logger().warning("https://me:word@host/x")
    assert capsys.readouterr().err == "[WARNING] key ***, ***, ***\n[WARNING] https://***@host/x\n"
    assert redact("hf_transfer, --max_new_tokens 8") == "hf_transfer, --max_new_tokens 8"


def test_no_password_of_an_address_in_args_json(tmp_path: Path) -> None:
    """And the same command is known as the same run."""
    args = SftArguments(model="https://me:word@host/x", dataset=["a", "https://me:word@host/y"], hub_token=TOKEN)
    stored = json.loads(args.save(tmp_path).read_text())
    assert stored["model"] == "https://***@host/x" and stored["dataset"] == ["a", "https://***@host/y"]
    assert stored["hub_token"] is None and args.model == "https://me:word@host/x"
    args.output_dir, args.resume = str(tmp_path), True
    assert prepare(args, lambda root: None, "checkpoint-") is None


def test_a_printed_command_is_whole_but_for_the_token() -> None:
    args = SftArguments(model="DIR", hub_token=TOKEN, lr=1e-3)
    assert command(["swiftlite", "sft"], args) == ["swiftlite", "sft", "--model", "DIR", "--lr", "0.001"]


def test_the_command_after_a_failed_push_keeps_its_flags(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    class Client:
        HfApi = staticmethod(lambda token: Client())

        def create_repo(self, *_: object, **__: object) -> None:
            raise RuntimeError("401 Client Error")

    monkeypatch.setattr(hub, "import_module", lambda name: Client)
    with pytest.raises(
        CheckpointError, match="--hub_model_id me/mine --use_hf true --hub_private_repo true` and the same"
    ):
        hub.push(str(tmp_path), "me/mine", use_hf=True, token=TOKEN, private=True)
