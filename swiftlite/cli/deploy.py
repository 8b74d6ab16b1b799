"""`swiftlite deploy`: an engine serves what was trained, under OpenAI's API. What it is given is made ready here."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from swiftlite.arguments.deploy import KEY_VARIABLE, DeployArguments
from swiftlite.checkpoint.chat import GENERATION, JINJA, Chat
from swiftlite.checkpoint.resolve import as_arguments, base_of_adapter, resolve
from swiftlite.cli.prepared import loads_beside, merged, name_of, readable
from swiftlite.llm.dataset.cache import cache_root
from swiftlite.llm.engines import Served, chosen, command, found, key_file, key_variables
from swiftlite.utils.directories import ADAPTER_CONFIG
from swiftlite.utils.errors import UsageError
from swiftlite.utils.io import read_json, write_json
from swiftlite.utils.logger import get_logger
from swiftlite.utils.text import one_line
from swiftlite.weights.journal import fingerprint

logger = get_logger()
_KEY_THERE = {
    "vllm": "set VLLM_API_KEY where it runs",
    "sglang": "add --api-key, or `api-key: KEY` in a --config file, where it runs",
    "transformers": "its server knows none; `swiftlite deploy` checks it",
}


def deploy_main(args: DeployArguments | Sequence[str]) -> None:
    """Serve until the engine ends; vLLM and SGLang take this process's place.

    Raises: UsageError for an engine that is not here, or cannot serve what is given; CheckpointError.
    """
    args = as_arguments(DeployArguments, args)
    asked = args.infer_backend
    engine = str(asked) if args.dry_run and asked else chosen(asked)
    if engine == "transformers" and not args.dry_run:
        from swiftlite.llm.openai_server import check_installed

        check_installed()
        _check_port(args.host, args.port)
    served = prepare(args, engine)
    words = command(engine, args, served)
    if args.dry_run:
        sys.stdout.write(shlex.join(words) + "\n")
        if args.api_key:
            logger.info("the key is not in the command: %s", _KEY_THERE[engine])
        return
    _say(args, engine, served, words)
    if engine == "transformers":
        from swiftlite.llm.openai_server import serve

        serve(words, _parent(served), args.api_key, args.max_model_len or args.model_info.max_model_len)
        return
    if args.api_key and engine == "sglang":
        words += key_file(_parent(served), args.api_key)
    program = found(engine)
    assert program is not None
    os.execve(program, words, {**os.environ, **key_variables(engine, args.api_key)})


def prepare(args: DeployArguments, engine: str) -> Served:
    """The directory that the engine reads: a model with the chat that was trained, its adapters beside it or merged.

    Resolves `args`. Raises: UsageError for adapters that cannot be served so.
    """
    words = args.loading_words()
    _check_there(args)
    # A Megatron checkpoint without a config.json takes that of --model.
    given = args.mcore_model or args.model
    beside = [*(["--model", args.model] if args.mcore_model and args.model else []), *words]
    name, adapters = given, list(zip(args.adapter_names, args.adapters, strict=True))
    model: str | None = None
    if given:
        read = readable(given, args.checkpoint, beside)
        model = read.model
        adapters += [(args.served_model_name or name_of(given), str(read.adapter))] if read.adapter else []
    adapters += [("", args.mcore_adapter)] if args.mcore_adapter else []
    directories: dict[str, Path] = {}
    for called, path in adapters:
        adapter = readable(path, args.checkpoint, ["--model", model, *words] if model else words).adapter
        if adapter is None:
            raise UsageError(f"--adapters {path}: is a whole model; give it with --model")
        name = name or path
        directories[called or name_of(path)] = adapter.absolute()
    if len(directories) < len(adapters):
        raise UsageError(f"--adapters: several are called {' '.join(directories)}; name them: --adapters a=DIR b=DIR")
    model = model or base_of_adapter(next(iter(directories.values())))
    directories, model = _merge(args, engine, directories, model, words)
    args.model = model
    args.mcore_model = args.mcore_adapter = None
    args.adapters = [str(path) for path in directories.values()]
    resolve(args)
    called = args.served_model_name or (name_of(str(name)) if os.path.exists(str(name)) else str(name))
    if called in directories:  # the adapter is what was asked for
        called = name_of(args.model_info.model_dir)
    if called in directories:
        raise UsageError(f"--adapters: {called} is what the model itself is called; name it: --adapters NAME=DIR")
    directory = view(args, called, engine)
    ranks = [int(read_json(path / ADAPTER_CONFIG).get("r", 0)) for path in directories.values()]
    return Served(directory, called, directories, max(ranks, default=0))


def _check_there(args: DeployArguments) -> None:
    """Raises: UsageError for a directory that is not; --model may be a hub's id."""
    places = [("mcore_model", args.mcore_model), ("mcore_adapter", args.mcore_adapter)]
    for flag, path in [*places, *(("adapters", path) for path in args.adapters)]:
        if path and not Path(path).is_dir():
            raise UsageError(f"--{flag} {path}: no such directory; check the path")


def _check_port(host: str, port: int) -> None:
    """transformers' server would only find out with the model loaded. Raises: UsageError if it cannot be listened to."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UsageError(f"--host {host} --port {port}: cannot be listened to: {one_line(error)}") from None


def _merge(
    args: DeployArguments, engine: str, adapters: dict[str, Path], model: str, words: Sequence[str]
) -> tuple[dict[str, Path], str]:
    """(adapters that are served beside the model, the model)."""
    together = [name for name, path in adapters.items() if not loads_beside(path)]
    merge = engine == "transformers" or bool(together) if args.merge_lora is None else args.merge_lora
    if not merge or not adapters:
        if together:
            raise UsageError(
                f"--adapters {together[0]}: {engine} loads plain LoRA of one rank alone; leave out --merge_lora"
            )
        return adapters, model
    if len(adapters) > 1:
        why = f"{together[0]} holds more than plain LoRA" if together else "one at a time can be merged"
        raise UsageError(
            f"--adapters {' '.join(adapters)}: {why}; serve them one by one, or plain LoRA with vllm or sglang"
        )
    return {}, str(merged(next(iter(adapters.values())), model, words))


def view(args: DeployArguments, name: str, engine: str) -> Path:
    """A directory of links to the model's files, with the chat template and end token that were trained.

    The files themselves, and whose they are, stay as they are. It lies in SWIFTLITE_CACHE/served, by what is in it.
    """
    source = Path(args.model_info.model_dir)
    chat, generation = _chat(args), read_json(source / GENERATION, optional=True)
    if engine == "transformers":
        # So that a request's temperature acts, as with the other engines; one of 0 still takes the likeliest token.
        generation["do_sample"] = True
    files = [path for path in source.iterdir() if path.is_file()]
    facts = [name, chat and [chat.jinja, chat.end], generation]
    identity = hashlib.sha256(fingerprint(files, facts).encode() + str(source).encode()).hexdigest()[:16]
    directory = cache_root() / "served" / identity / name
    if directory.is_dir():
        return directory
    made = directory.with_name(f".{directory.name}.{os.getpid()}")
    made.mkdir(parents=True)
    try:
        for path in files:
            if path.name in (GENERATION, "tokenizer_config.json", JINJA):  # what a chat may change
                shutil.copy(path, made)
            else:
                (made / path.name).symlink_to(path.absolute())
        if generation:
            write_json(made / GENERATION, generation)
        if chat is not None:
            chat.write(made)
        made.rename(directory)
    except OSError:
        if not directory.is_dir():  # another process was faster
            raise
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return directory


def _chat(args: DeployArguments) -> Chat | None:
    """What the model was trained to chat with; its settings written into the template, which is all that servers read."""
    if not args.use_chat_template:
        logger.info("the model writes plain text: ask it at /v1/completions")
        return None
    from swiftlite.llm.pipeline import prepare_template
    from swiftlite.llm.template.trained import trained_chat

    template = prepare_template(args)
    chat = trained_chat(template)
    assert chat is not None
    if args.response_prefix is not None:
        logger.warning("servers do not write --response_prefix: answers begin as the chat template says")
    first = prelude(args.system, args.enable_thinking)
    return Chat(first + template.chat.source(), chat.end) if first else chat


def prelude(system: str | None, thinking: bool | None) -> str:
    """Jinja before a chat template: a system message where a conversation has none, and whether the model thinks."""
    text = ""
    if thinking is not None:
        said = str(thinking).lower()
        text += f"{{%- if enable_thinking is not defined %}}{{%- set enable_thinking = {said} %}}{{%- endif %}}"
    if system:
        message = f"{{'role': 'system', 'content': {json.dumps(system, ensure_ascii=False)}}}"
        text += f"{{%- if messages[0].role != 'system' %}}{{%- set messages = [{message}] + messages %}}{{%- endif %}}"
    return text


def _parent(served: Served) -> Path:
    """Where the served name is the path of the view."""
    return served.directory.parents[served.name.count("/")]


def _say(args: DeployArguments, engine: str, served: Served, words: Sequence[str]) -> None:
    logger.info("%s", shlex.join(words))
    named = [f"{served.name}:{name}" if engine == "sglang" else name for name in served.adapters]
    shown = f"[{args.host}]" if ":" in args.host else args.host
    logger.info("http://%s:%d/v1 serves %s", shown, args.port, ", ".join([served.name, *named]))
    if args.host not in ("127.0.0.1", "localhost", "::1") and not args.api_key:
        logger.warning("--host %s without a key: whoever reaches it can use it; set %s", args.host, KEY_VARIABLE)
