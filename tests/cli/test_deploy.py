"""`swiftlite deploy`: words of engines, what is made ready for them, and transformers' server asked by OpenAI's client."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from swiftlite.arguments.deploy import DeployArguments
from swiftlite.arguments.parser import parse
from swiftlite.checkpoint.preflight import check_command
from swiftlite.cli import deploy, prepared
from swiftlite.cli.export import export_main
from swiftlite.llm import engines, openai_server
from swiftlite.llm.stop_words import StopWords
from swiftlite.utils.errors import CheckpointError, UsageError
from tests.serving import ASK, HELLO, SAID, TOOLS


def arguments(*words: str) -> DeployArguments:
    return parse(DeployArguments, ["--model", "DIR", *words])


SERVED = engines.Served(Path("/m/tuned"), "tuned")
WITH_ADAPTERS = engines.Served(Path("/m/base"), "base", {"a": Path("/a"), "b": Path("/b")}, 12)
FLAGS = ["--max_model_len", "4096", "--torch_dtype", "bf16", "--tensor_parallel_size", "2", "--port", "9000", "--host",
         "0.0.0.0", "--gpu_memory_utilization", "0.8", "--trust_remote_code", "true"]  # fmt: skip
ENGINE_WORDS = [
    ("vllm", [], SERVED, "vllm serve /m/tuned --served-model-name tuned --host 127.0.0.1 --port 8000"),
    ("vllm", FLAGS, WITH_ADAPTERS,
     "vllm serve /m/base --served-model-name base --host 0.0.0.0 --port 9000 --dtype bfloat16 --max-model-len 4096 "
     "--gpu-memory-utilization 0.8 --tensor-parallel-size 2 --enable-lora --max-lora-rank 16 --max-loras 2 "
     "--lora-modules a=/a b=/b --trust-remote-code"),
    ("vllm", ["--vllm_enforce_eager", "true", "--", "--max-num-seqs", "8"], SERVED,
     "vllm serve /m/tuned --served-model-name tuned --host 127.0.0.1 --port 8000 --enforce-eager --max-num-seqs 8"),
    ("sglang", [], SERVED,
     "sglang serve --model-path /m/tuned --served-model-name tuned --host 127.0.0.1 --port 8000"),
    ("sglang", FLAGS, WITH_ADAPTERS,
     "sglang serve --model-path /m/base --served-model-name base --host 0.0.0.0 --port 9000 --dtype bfloat16 "
     "--context-length 4096 --mem-fraction-static 0.8 --tp-size 2 --enable-lora --lora-paths a=/a b=/b "
     "--trust-remote-code"),
    ("transformers", ["--torch_dtype", "fp16", "--attn_impl", "sdpa", "--", "--log-level", "info"], SERVED,
     "transformers serve tuned --host 127.0.0.1 --port 8000 --dtype float16 --attn-implementation sdpa --log-level info"),
]  # fmt: skip


@pytest.mark.parametrize(("engine", "words", "served", "expected"), ENGINE_WORDS)
def test_words_of_engines(engine: str, words: list[str], served: engines.Served, expected: str) -> None:
    key = ["--api_key", "a-secret-key"]
    assert engines.command(engine, arguments(*key, *words), served) == expected.split()


def test_names_of_adapters_and_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    args = arguments("--adapters", "law=/x/law", "/y/a=b", "~/c")
    assert args.adapters == ["/x/law", "/y/a=b", os.path.expanduser("~/c")] and args.adapter_names == ["law", "", ""]
    monkeypatch.setenv("SWIFTLITE_API_KEY", "from-the-environment")
    assert arguments().api_key == "from-the-environment"
    assert engines.key_variables("vllm", "k") == {"VLLM_API_KEY": "k"} and engines.key_variables("vllm", None) == {}
    flag, path = engines.key_file(tmp_path, "it's")
    assert flag == "--config" and Path(path).read_text() == "api-key: 'it''s'\n"
    assert os.stat(path).st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("engine", "words", "served", "message"),
    [
        ("transformers", [], WITH_ADAPTERS, "a b: transformers serves one model; merge one"),
        ("transformers", ["--tensor_parallel_size", "2"], SERVED, "needs --infer_backend vllm"),
        ("vllm", [], engines.Served(Path("/m"), "m", {"a": Path("/a")}, 1024), "ranks up to 512; merge it"),
    ],
)
def test_what_engines_cannot_do(engine: str, words: list[str], served: engines.Served, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        engines.command(engine, arguments(*words), served)


def test_engine_that_is_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert engines.chosen(None) == "transformers"
    with pytest.raises(UsageError, match="vllm: is not installed here; pip install vllm, or add --dry_run true"):
        engines.chosen("vllm")
    program(tmp_path / "sglang", "")
    assert engines.chosen(None) == engines.chosen("sglang") == "sglang"
    with pytest.raises(UsageError, match="lmdeploy: use vllm or sglang"):
        arguments("--infer_backend", "lmdeploy")


def program(path: Path, text: str) -> Path:
    path.write_text(f"#!{sys.executable}\n{text}")
    path.chmod(0o755)
    return path


def test_text_is_held_back_while_it_may_be_a_stop_word() -> None:
    words = StopWords(["END", "##"])
    assert [words.feed(piece) for piece in ("one E", "N", "x E", "ND two", "three")] == ["one", " ", "ENx", " ", ""]
    assert words.ended and words.rest() == ""
    words = StopWords(["END"])
    assert words.feed("an EN") + words.rest() == "an EN"


# ---- what is made ready ----


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("SWIFTLITE_CACHE", str(root))
    return root


def prepare(*words: str, engine: str = "vllm") -> engines.Served:
    args = parse(DeployArguments, list(words))
    check_command(args)
    return deploy.prepare(args, engine)


def test_the_served_directory_has_the_settings_that_were_trained(chat_model: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    trained = tmp_path / "out" / "checkpoint-7"
    shutil.copytree(chat_model, trained)
    (trained / "args.json").write_text(json.dumps({"system": 'Say "{%" ❄ 😀\nalways', "enable_thinking": False}))
    before = {path.name: path.read_bytes() for path in trained.iterdir()}
    served = prepare("--model", str(trained))
    assert served.name == "out-checkpoint-7" and prepare("--model", str(trained)) == served
    assert (served.directory / "model.safetensors").resolve() == (trained / "model.safetensors").resolve()
    assert {path.name: path.read_bytes() for path in trained.iterdir()} == before
    tokenizer = AutoTokenizer.from_pretrained(served.directory)
    own = AutoTokenizer.from_pretrained(trained)
    system = [{"role": "system", "content": 'Say "{%" ❄ 😀\nalways'}]

    def text(of: Any, messages: list[dict[str, str]]) -> str:
        return str(of.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    assert text(tokenizer, HELLO) == text(own, system + HELLO) != text(own, HELLO)
    other = [{"role": "system", "content": "Be brief."}, *HELLO]
    assert text(tokenizer, other) == text(own, other)
    assert "enable_thinking = false" in tokenizer.chat_template
    given = json.loads((served.directory / "generation_config.json").read_text())
    assert given["eos_token_id"] == json.loads(before["generation_config.json"])["eos_token_id"]
    # Another engine, another view: requests' temperatures act with transformers too.
    view = prepare("--model", str(trained), "--served_model_name", "org/name", engine="transformers")
    assert json.loads((view.directory / "generation_config.json").read_text())["do_sample"] is True
    assert deploy._parent(view) / "org/name" == view.directory


def test_megatron_checkpoints_are_converted_once(chat_model: Path, tmp_path: Path, cache: Path) -> None:
    mcore = tmp_path / "mcore"
    export_main(["--model", str(chat_model), "--to_mcore", "true", "--output_dir", str(mcore)])
    first = prepare("--model", str(mcore))
    (made,) = (cache / "models").iterdir()
    stamp = (made / "model.safetensors").stat().st_mtime_ns
    assert first.directory.name == "mcore" and (first.directory / "model.safetensors").resolve().parent == made
    assert (made / "model.safetensors").read_bytes() == (chat_model / "model.safetensors").read_bytes()
    assert prepare("--mcore_model", str(mcore)) == first
    assert (made / "model.safetensors").stat().st_mtime_ns == stamp and len(list((cache / "models").iterdir())) == 1
    file = next(mcore.glob("iter_*/*.distcp"))
    os.utime(file)  # another checkpoint, for all that is known
    assert prepare("--model", str(mcore)).directory != first.directory
    assert len(list((cache / "models").iterdir())) == 2


def test_adapters_beside_the_model_or_merged(chat_model: Path, adapter: Path, tmp_path: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    served = prepare("--adapters", f"one={adapter}", f"two={adapter}", "--model", str(chat_model))
    assert served.adapters == {"one": adapter, "two": adapter} and served.max_rank == 6 and served.name == "tiny"
    of_run = prepare("--model", str(adapter.parent))  # who asks for the run by its name gets what it has learnt
    assert of_run.adapters == {adapter.parent.name: adapter} and of_run.name == "tiny"
    assert prepare("--model", str(adapter.parent), "--served_model_name", "law").adapters == {"law": adapter}
    with pytest.raises(UsageError, match="--adapters: tiny is what the model itself is called"):
        prepare("--adapters", f"tiny={adapter}", "--model", str(chat_model))
    with pytest.raises(UsageError, match="--adapters nowhere: no such directory"):
        prepare("--adapters", "nowhere", "--model", str(chat_model))
    with pytest.raises(UsageError, match="--mcore_model nowhere: no such directory"):
        prepare("--mcore_model", "nowhere")
    alone = prepare("--adapters", str(adapter), engine="transformers")  # its config names the base
    assert not alone.adapters and alone.name == f"{adapter.parent.name}-checkpoint-4"
    ids = torch.arange(10)[None]
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(alone.directory)(ids).logits
        expected = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(chat_model), str(adapter))(ids).logits
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-5)
    more = tmp_path / "more"
    shutil.copytree(adapter, more)
    config = json.loads((more / "adapter_config.json").read_text())
    (more / "adapter_config.json").write_text(json.dumps({**config, "alpha_pattern": {"q_proj": 64}}))
    assert not prepared.loads_beside(more) and prepared.loads_beside(adapter)
    with pytest.raises(UsageError, match="more holds more than plain LoRA; serve them one by one"):
        prepare("--adapters", str(more), str(adapter))
    with pytest.raises(UsageError, match="vllm loads plain LoRA of one rank alone"):
        prepare("--adapters", str(more), "--merge_lora", "false")
    with pytest.raises(UsageError, match="is a whole model; give it with --model"):
        prepare("--adapters", str(chat_model))


def test_checkpoints_of_a_run(chat_model: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for step in (5, 10):
        shutil.copytree(chat_model, run / f"checkpoint-{step}")
    assert prepared.readable(str(run)).model == str(run / "checkpoint-10")
    with pytest.raises(UsageError, match="no evaluation of this run has chosen a best checkpoint"):
        prepared.readable(str(run), "best")
    (run / "best.json").write_text(json.dumps({"checkpoint": "checkpoint-5"}))
    assert prepared.readable(str(run), "best").model == str(run / "checkpoint-5")
    assert prepared.readable("ORG/NAME").model == "ORG/NAME"
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="holds neither a model nor a checkpoint"):
        prepared.readable(str(tmp_path / "empty"))


def test_the_engine_takes_the_place_of_the_command(chat_model: Path, tmp_path: Path) -> None:
    """Its program gets the words as they are printed, and the key by the environment."""
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    program(
        bin_ / "vllm", "import json, os, sys\nprint(json.dumps([os.getpid(), sys.argv, os.environ['VLLM_API_KEY']]))\n"
    )
    words = [sys.executable, "-m", "swiftlite", "deploy", "--model", str(chat_model), "--infer_backend", "vllm"]
    environ = {**os.environ, "PATH": f"{bin_}:{os.environ['PATH']}", "SWIFTLITE_API_KEY": "a-secret-key"}
    child = subprocess.Popen([*words, "--", "--seed", "3"], env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, log = child.communicate()
    pid, argv, key = json.loads(out)
    assert (pid, key, child.returncode) == (child.pid, "a-secret-key", 0) and b"a-secret-key" not in log
    served = prepare("--model", str(chat_model))
    assert argv[1:] == engines.command("vllm", arguments("--", "--seed", "3"), served)[1:]


# ---- transformers' server ----


@pytest.fixture(scope="module")
def app(chat_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The application that `swiftlite deploy --infer_backend transformers` runs, without a port."""
    import uvicorn

    found: list[Any] = []
    with contextlib.chdir("."), pytest.MonkeyPatch.context() as patch:
        patch.setenv("SWIFTLITE_CACHE", str(tmp_path_factory.mktemp("served")))
        patch.setattr(uvicorn.Server, "run", lambda self: found.append(self.config.app))
        with pytest.raises(SystemExit) as ended:
            deploy.deploy_main(
                ["--model", str(chat_model), "--infer_backend", "transformers", "--api_key", "the-key-of-the-test",
                 "--port", str(free_port()), "--", "--device", "cpu"]
            )  # fmt: skip
        assert ended.value.code in (0, None)
        yield found[0]  # still where the server is: the model's name is its path there


def ask(app: Any, use: Callable[[openai.AsyncOpenAI], Any], key: str = "the-key-of-the-test") -> Any:
    """What `use` returns for OpenAI's client of the application."""
    import httpx2

    async def run() -> Any:
        http = httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app), base_url="http://test")
        async with openai.AsyncOpenAI(
            api_key=key, base_url="http://test/v1", http_client=http, max_retries=0
        ) as client:
            return await use(client)

    return asyncio.run(run())


async def complete(client: openai.AsyncOpenAI, **keywords: Any) -> Any:
    return await client.chat.completions.create(**{"model": "tiny", "messages": HELLO, "temperature": 0, **keywords})


async def stream(client: openai.AsyncOpenAI, **keywords: Any) -> tuple[str, list[str]]:
    text, ends = "", []
    async for chunk in await complete(client, stream=True, **keywords):
        text += chunk.choices[0].delta.content or ""
        ends += [chunk.choices[0].finish_reason] if chunk.choices[0].finish_reason else []
    return text, ends


def test_chat_of_the_openai_client(app: Any) -> None:
    async def use(client: openai.AsyncOpenAI) -> None:
        assert [model.id async for model in client.models.list()] == ["tiny"]
        whole = await complete(client)
        assert (whole.choices[0].message.content, whole.choices[0].finish_reason) == (SAID, "stop")
        assert whole.usage.prompt_tokens + whole.usage.completion_tokens == whole.usage.total_tokens
        assert await stream(client) == (SAID, ["stop"])
        short = await complete(client, max_tokens=3)
        assert short.choices[0].finish_reason == "length" and short.usage.completion_tokens == 3
        stopped = await complete(client, stop=["help", "zzz"])
        assert (stopped.choices[0].message.content, stopped.choices[0].finish_reason) == ("Hello! How can I ", "stop")
        assert await stream(client, stop="lp you") == ("Hello! How can I he", ["stop"])
        for stop in ({}, {"stop": "lp you"}):  # the client above reads no further; others wait for it
            asked = {"model": "tiny", "messages": HELLO, "stream": True, **stop}
            raw = await client._client.post(  # as it comes, without the client's reading
                "/v1/chat/completions", json=asked, headers={"Authorization": "Bearer the-key-of-the-test"}
            )
            assert raw.text.endswith("}\n\ndata: [DONE]\n\n") and raw.text.count("[DONE]") == 1
        parts = [{"role": "user", "content": [{"type": "text", "text": "Hello!"}]}]
        assert (await complete(client, messages=parts)).choices[0].message.content == SAID
        text = await client.completions.create(
            model="tiny",
            prompt="<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\n",
            stop=" How",
            temperature=0,
        )
        assert text.choices[0].text == "Hello!"

    ask(app, use)


def test_tools_of_the_openai_client(app: Any) -> None:
    async def use(client: openai.AsyncOpenAI) -> None:
        answer = await complete(client, messages=ASK, tools=TOOLS)
        (call,) = answer.choices[0].message.tool_calls
        assert answer.choices[0].finish_reason == "tool_calls"
        assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "Paris"})
        calls = []
        async for chunk in await complete(client, messages=ASK, tools=TOOLS, stream=True):
            calls += chunk.choices[0].delta.tool_calls or []
        assert [call.function.name for call in calls] == ["weather"]
        said = [*ASK, answer.choices[0].message.model_dump(exclude_none=True)]
        result = {"role": "tool", "tool_call_id": call.id, "content": "no"}
        assert (
            await complete(client, messages=[*said, result], tools=TOOLS, max_tokens=2)
        ).usage.completion_tokens == 2

    ask(app, use)


BAD = [
    ({"messages": []}, "at least one message"),
    ({"messages": [{"content": "x"}]}, "object with a role"),
    ({"messages": [{"role": "user", "content": 7}]}, "content must be a text"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "only parts of text"),
    ({"messages": [{"role": "user", "content": "word " * 400}]}, r"the prompt has \d+ tokens .* the model holds 512"),
    ({"max_tokens": 0}, "max_tokens is 0; it must be a whole number"),
    ({"temperature": -1}, "temperature is -1; it must be a number from 0 to 2"),
    ({"stop": [""]}, "none of them empty"),
    ({"tools": [{"type": "function"}]}, "tools must be a list"),
    ({"n": 2}, "n: transformers' server does not have it"),
    ({"response_format": {"type": "json_object"}}, "response_format: "),
    ({"presence_penalty": 1}, "presence_penalty: "),
    ({"model": "other"}, "400 - Server is pinned to 'tiny'; requested 'other'"),
]


def test_bad_requests_are_the_clients(app: Any) -> None:
    async def use(client: openai.AsyncOpenAI) -> None:
        for keywords, message in BAD:
            with pytest.raises(openai.BadRequestError, match=message):
                await complete(client, **keywords)
        with pytest.raises(openai.UnprocessableEntityError, match="422 - Unexpected fields in the request: .*bogus"):
            await complete(client, extra_body={"bogus": 1})
        for path, body in (("/chat/completions", b"{"), ("/chat/completions", b"[]"), ("/completions", b"{}")):
            with pytest.raises(openai.BadRequestError):
                await client.post(path, cast_to=object, content=body)
        for path in ("/load_model", "/reset"):  # a server of one model, whatever a client asks
            with pytest.raises(openai.NotFoundError):
                await client.with_options(base_url="http://test").post(path, cast_to=object, body={"model": "ORG/NAME"})

    ask(app, use)

    async def unknown(client: openai.AsyncOpenAI) -> None:
        with pytest.raises(openai.AuthenticationError, match="the API key is missing or wrong"):
            await complete(client)

    ask(app, unknown, "another-key")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_port_that_is_taken_is_told_before_the_model_is_loaded() -> None:
    words = ["--model", "ORG/NAME", "--infer_backend", "transformers", "--port"]
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = other.getsockname()[1]
        with pytest.raises(UsageError, match=f"--port {taken}: cannot be listened to: .*in use"):
            deploy.deploy_main([*words, str(taken)])


def test_what_the_server_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    openai_server.check_installed()
    real = openai_server.importlib.util.find_spec
    monkeypatch.setattr(
        openai_server.importlib.util, "find_spec", lambda name: None if name == "uvicorn" else real(name)
    )
    with pytest.raises(UsageError, match=r"uvicorn not installed; pip install 'swiftlite\[serve\]'"):
        openai_server.check_installed()


@pytest.mark.slow
def test_a_server_in_its_own_process(chat_model: Path) -> None:
    port = free_port()
    words = ["deploy", "--model", str(chat_model), "--infer_backend", "transformers", "--port", str(port)]
    child = subprocess.Popen([sys.executable, "-m", "swiftlite", *words], stderr=subprocess.DEVNULL)
    try:
        client = openai.OpenAI(api_key="none", base_url=f"http://127.0.0.1:{port}/v1", max_retries=0)
        until = time.monotonic() + 240
        while True:
            try:
                client.models.list()
                break
            except openai.APIConnectionError:
                assert child.poll() is None and time.monotonic() < until
                time.sleep(0.5)
        answer = client.chat.completions.create(model="tiny", messages=HELLO, temperature=0)  # type: ignore[arg-type]
        assert answer.choices[0].message.content == SAID
    finally:
        child.send_signal(signal.SIGTERM)
        assert child.wait(60) in (0, -signal.SIGTERM, 128 + signal.SIGTERM)
