"""`swiftlite COMMAND [config.yaml] [--flag value ...]`: finds the command, reads its arguments, runs or launches it.

Nothing heavy is imported before the arguments are known to be right.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from swiftlite import __version__
from swiftlite.cli.routes import ELSEWHERE, ROUTES, Route
from swiftlite.utils.dist import is_main_process
from swiftlite.utils.errors import SwiftliteError, UsageError
from swiftlite.utils.logger import get_logger
from swiftlite.utils.secrets import SETTINGS, redact, remember_words
from swiftlite.utils.text import nearest, printable

if TYPE_CHECKING:
    from swiftlite.arguments.parser import Arguments

_TRUE = ("true", "1", "yes", "on")


def usage() -> str:
    lines = ["usage: swiftlite COMMAND [config.yaml|config.json] [--flag value ...]", "", "commands:"]
    lines += [f"  {' '.join(words):<18}{route.help}" for words, route in ROUTES.items()]
    lines += ["", "`swiftlite COMMAND --help`: the flags needed first; `--help all`: all; `--help WORD`: some.",
              "Several processes: NPROC_PER_NODE=4 swiftlite COMMAND ... (and NNODES, NODE_RANK, MASTER_ADDR, "
              "MASTER_PORT)."]  # fmt: skip
    return "\n".join(lines)


def find_route(argv: Sequence[str]) -> tuple[tuple[str, ...], Route, list[str]]:
    """(command words, route, the remaining arguments). Raises: UsageError naming the nearest command."""
    for length in (2, 1):
        words = tuple(argv[:length])
        if words in ROUTES:
            return words, ROUTES[words], list(argv[length:])
    if argv[0] in ELSEWHERE:
        raise UsageError(f"{argv[0]}: is not a command here; {ELSEWHERE[argv[0]]}")
    typed = " ".join(word for word in argv[:2] if not word.startswith("-"))
    names = [" ".join(words) for words in ROUTES]
    if argv[0] == "megatron":
        names = [name for name in names if name.startswith("megatron ")]
    hint = nearest(typed, names)
    raise UsageError(f"unknown command {typed or argv[0]!r}{hint or ';'} commands: {', '.join(names)}")


def _load(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def wants_debug(argv: Sequence[str]) -> bool:
    """True for `--debug`, `--debug true`, `--debug=true`; read from the words, as parsing itself may fail."""
    for index, word in enumerate(argv):
        if word.startswith("--debug="):
            return word.partition("=")[2].lower() in _TRUE
        if word == "--debug":
            following = argv[index + 1] if index + 1 < len(argv) else "--"
            return following.startswith("--") or following.lower() in _TRUE
    return False


def run(argv: Sequence[str]) -> int:
    """Run one command. Returns: the exit code. Raises whatever the command raises."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        sys.stdout.write(usage() + "\n")
        return 0
    if argv[0] in ("-V", "--version", "version"):
        sys.stdout.write(f"swiftlite {__version__}\n")
        return 0
    if list(argv[:1]) == ["megatron"] and (len(argv) == 1 or argv[1] in ("-h", "--help")):
        sys.stdout.write(usage() + "\n")
        return 0
    words, route, rest = find_route(argv)
    arguments = _load(route.arguments)
    asked = next((place for place, word in enumerate(rest) if word in ("-h", "--help")), None)
    if asked is not None:
        from swiftlite.arguments.help import Command, format_help

        command = Command(f"swiftlite {' '.join(words)}", route.help, route.example, route.launch)
        sys.stdout.write(format_help(arguments, command, rest[asked + 1 :]) + "\n")
        return 0
    from swiftlite.cli.launcher import SHUTDOWN_SECONDS, launch, torchrun_args
    from swiftlite.utils.processes import end_with_parent

    if "TORCHELASTIC_RUN_ID" in os.environ:  # a worker
        end_with_parent(patience=SHUTDOWN_SECONDS)
    torchrun = torchrun_args(os.environ)
    if torchrun is None or not route.launch:
        args = _parse(arguments, rest)
        if torchrun is not None:
            get_logger().warning("%s runs in one process; NPROC_PER_NODE and NNODES have no effect", " ".join(words))
        return _handle(route, args)
    # Mistakes in the arguments are told once, here, instead of once per process; remarks are left to the workers.
    logger = get_logger()
    level = logger.level
    logger.setLevel(logging.WARNING)
    args = _parse(arguments, rest)
    logger.setLevel(level)
    if getattr(args, "dry_run", False):
        return _handle(route, args)
    return launch(torchrun, argv, os.environ)


def _parse(arguments: type[Arguments], words: Sequence[str]) -> Any:
    """The arguments, as far as they can be checked without torch."""
    from swiftlite.arguments.config_file import write_config_file
    from swiftlite.arguments.parser import given_values, parse

    args = parse(arguments, words)
    _load("swiftlite.checkpoint.preflight:check_command")(args)
    if getattr(args, "save_config", None) and "TORCHELASTIC_RUN_ID" not in os.environ:  # not each worker once more
        write_config_file(args.save_config, given_values(args, {"save_config", *SETTINGS}))
    return args


def _handle(route: Route, args: Arguments) -> int:
    from swiftlite.utils.quiet import quiet

    if not getattr(args, "debug", False):  # deprecations inside libraries are nothing that a user can act on
        quiet()
    result = _load(route.handler)(args)
    # A run that a signal ended early has saved; it still ends as the signal would have ended it. One of several processes
    # says so: torchrun would kill the others for it.
    number = result.get("signal") if isinstance(result, dict) and is_main_process() else None
    if isinstance(result, dict) and "exit_code" in result:
        return int(result["exit_code"])
    return 128 + int(number) if number else 0


def _message(error: BaseException) -> str:
    """One line: errors of swiftlite speak for themselves, others are named by type."""
    text = printable(" ".join(str(error).split()))
    if isinstance(error, SwiftliteError):
        return text
    if isinstance(error, ModuleNotFoundError) and error.name:
        package = {"megatron": "'swiftlite[megatron]'", "yaml": "pyyaml"}.get(top := error.name.partition(".")[0], top)
        return f"the package {top} is missing; run: pip install {package}"
    return f"{type(error).__name__}: {text or 'no message'} (the traceback: --debug true)"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the `swiftlite` script.

    Returns: 0, 1 for a failure, 2 for wrong usage, 130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    remember_words(argv)
    try:
        return run(argv)
    except KeyboardInterrupt:
        sys.stderr.write("swiftlite: interrupted\n")
        return 130
    except SystemExit:
        raise
    except BaseException as error:  # some libraries' failures are not an Exception (torch's CheckpointException)
        if wants_debug(argv):
            sys.stderr.write(redact(traceback.format_exc()))
        several = os.environ.get("WORLD_SIZE", "1") != "1" and "RANK" in os.environ
        rank = f" [rank {os.environ['RANK']}]" if several else ""
        sys.stderr.write(f"swiftlite: error:{rank} {redact(_message(error))}\n")
        return error.exit_code if isinstance(error, SwiftliteError) else 1


if __name__ == "__main__":
    sys.exit(main())
