"""The command line as a user meets it: help, errors, exit codes, torchrun."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from swiftlite.cli import launcher
from swiftlite.cli.main import find_route, main, wants_debug
from swiftlite.cli.routes import ROUTES, Route
from swiftlite.utils.errors import UsageError

ROOT = Path(__file__).parents[2]


def swiftlite(*argv, **environ):
    return subprocess.run(
        [sys.executable, "-m", "swiftlite", *argv], capture_output=True, text=True, cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environ}, timeout=120,
    )  # fmt: skip


def test_an_unknown_log_level_is_told():
    done = swiftlite("plot", "missing", SWIFTLITE_LOG_LEVEL="loud")
    assert done.returncode == 2
    assert done.stderr == "swiftlite: error: SWIFTLITE_LOG_LEVEL is loud: must be one of DEBUG, INFO, WARNING, ERROR\n"


# ---- help and version ----


@pytest.mark.parametrize("argv", [["--help"], ["--version"], [], ["export", "--help"], ["megatron", "sft", "--help"]])
def test_help_imports_nothing_heavy(argv):
    code = (
        "import sys\nfrom swiftlite.cli.main import main\n"
        f"code = main({argv!r})\n"
        "heavy = {'torch', 'transformers', 'megatron', 'numpy', 'datasets', 'yaml', 'swiftlite.families'}\n"
        "heavy &= set(sys.modules)\n"
        "assert code == 0 and not heavy, (code, heavy)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "swiftlite" in done.stdout


def test_help_answers_within_300_ms():
    times = []
    for _ in range(3):
        start = time.perf_counter()
        assert swiftlite("--help").returncode == 0
        times.append(time.perf_counter() - start)
    assert min(times) < 0.3


def test_every_route_has_arguments_and_help(capsys):
    for words in ROUTES:
        assert main([*words, "--help"]) == 0
        assert f"usage: swiftlite {' '.join(words)}" in capsys.readouterr().out


# ---- errors ----


@pytest.mark.parametrize(
    "argv, message",
    [
        (["exprt"], "unknown command 'exprt'; did you mean export?"),
        (["megatron", "stf"], "did you mean megatron sft"),
        (["nonsense", "--x", "1"], "unknown command 'nonsense'; commands: sft, pt, dpo, rlhf, megatron sft"),
        (["export", "--to_mcre", "true"], "--to_mcre: unknown flag; did you mean --to_mcore"),
        (["export", "--to_mcore", "true"], "--to_mcore true: give the Hugging Face checkpoint with --model"),
        (["export", "--to_hf", "true"], "--to_hf true: give the Megatron checkpoint with --mcore_model"),
        (["export", "--max_shard_size", "5XB"], "--max_shard_size 5XB: must be a size like 5GB"),
        (["export", "missing.yaml"], "missing.yaml: no such config file"),
        (["megatron", "sft", "--model", "DIR", "--beta", "0.1"], "--beta: belongs to preference training"),
    ],
)
def test_usage_errors(argv, message, capsys):
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert err.startswith("swiftlite: error: ") and message in err
    assert err.count("\n") == 1 and "Traceback" not in err


@pytest.fixture
def route(monkeypatch):
    """Replace the handler of `infer` by a function of the test."""

    def replace(function):
        monkeypatch.setitem(ROUTES, ("infer",), Route(ROUTES[("infer",)].arguments, f"{__name__}:_handler", False, ""))
        monkeypatch.setattr(sys.modules[__name__], "_handler", function, raising=False)

    return replace


def test_other_exceptions_are_one_line_with_a_hint(route, capsys):
    def fail(args):
        raise RuntimeError("two\nlines")

    route(fail)
    assert main(["infer", "--model", "ORG/NAME"]) == 1
    assert capsys.readouterr().err == "swiftlite: error: RuntimeError: two lines (the traceback: --debug true)\n"
    assert main(["infer", "--model", "ORG/NAME", "--debug", "true"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_interrupt_is_130_and_success_is_0(route, capsys):
    def interrupt(args):
        raise KeyboardInterrupt

    route(interrupt)
    assert main(["infer", "--model", "ORG/NAME"]) == 130
    seen = []
    route(seen.append)
    assert main(["infer", "--model", "ORG/NAME", "--prompt", "hi"]) == 0
    assert seen[0].prompt == "hi" and seen[0].model == "ORG/NAME"


def test_debug_is_read_from_the_words():
    assert wants_debug(["--debug"]) and wants_debug(["--debug", "true"]) and wants_debug(["--debug=1"])
    assert not wants_debug(["--debug", "false"]) and not wants_debug(["--prompt", "debug"])


def test_commands_of_one_process_say_so(route, capsys, monkeypatch):
    monkeypatch.setenv("NPROC_PER_NODE", "2")
    route(lambda args: None)
    assert main(["infer", "--model", "ORG/NAME"]) == 0
    assert "infer runs in one process; NPROC_PER_NODE" in capsys.readouterr().err


def test_megatron_export_is_export():
    assert find_route(["megatron", "export", "--a"])[1] is find_route(["export"])[1]


# ---- torchrun ----


def test_torchrun_only_when_asked_for():
    assert launcher.torchrun_args({}) is None
    assert launcher.torchrun_args({"NPROC_PER_NODE": "1", "NNODES": "1"}) is None
    assert launcher.torchrun_args({"NPROC_PER_NODE": "2", "TORCHELASTIC_RUN_ID": "none"}) is None
    args = launcher.torchrun_args({"NPROC_PER_NODE": "2", "MASTER_PORT": "1234"})
    assert args == ["--nproc_per_node=2", "--nnodes=1", "--node_rank=0", "--master_addr=127.0.0.1",
                    "--master_port=1234"]  # fmt: skip
    args = launcher.torchrun_args({"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "host"})
    assert args == ["--nproc_per_node=1", "--nnodes=2", "--node_rank=1", "--master_addr=host", "--master_port=29500"]


@pytest.mark.parametrize(
    "environ, message",
    [
        ({"NPROC_PER_NODE": "two"}, "NPROC_PER_NODE=two: must be a whole number from 1"),
        ({"NPROC_PER_NODE": "0"}, "NPROC_PER_NODE=0: must be"),
        ({"NNODES": "2"}, "NNODES=2: set MASTER_ADDR"),
        ({"NNODES": "2", "NODE_RANK": "2", "MASTER_ADDR": "h"}, "NODE_RANK=2: must be below NNODES=2"),
    ],
)
def test_launcher_mistakes(environ, message):
    with pytest.raises(UsageError, match=message):
        launcher.torchrun_args(environ)


def test_threads_are_divided_but_a_choice_is_kept():
    cores = len(os.sched_getaffinity(0))
    assert launcher.worker_environment({"NPROC_PER_NODE": str(cores)})["OMP_NUM_THREADS"] == "1"
    assert launcher.worker_environment({"OMP_NUM_THREADS": "3"})["OMP_NUM_THREADS"] == "3"


def test_usage_errors_are_told_once_before_torchrun_starts():
    done = swiftlite("megatron", "sft", "--modle", "DIR", NPROC_PER_NODE="2")
    assert done.returncode == 2 and done.stderr.count("error") == 1


# A stand-in for the package's entry module: each worker runs this instead of a command.
WORKER = """
import os, sys, time, signal
out = os.path.join(os.environ["OUT"], os.environ["RANK"])
open(out, "w").write(os.environ["WORLD_SIZE"] + " " + " ".join(sys.argv[1:]))
if "fail" in sys.argv and os.environ["RANK"] == "1":
    sys.exit(7)
if "wait" in sys.argv:
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *a: (time.sleep(3), open(out + ".term", "w").close(), sys.exit(0)))
    open(out + ".ready", "w").close()
    time.sleep(60)
"""


def start(tmp_path, word, **variables):
    """Launch two workers from another process, with a module `swiftlite_worker` in place of `swiftlite`."""
    (tmp_path / "swiftlite_worker.py").write_text(WORKER)
    code = (
        "import os, signal, sys, subprocess\nfrom swiftlite.cli import launcher\n"
        "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"  # what nohup started ignores it
        "popen = subprocess.Popen\n"
        "def swap(command, **kw):\n"
        "    return popen(['swiftlite_worker' if w == 'swiftlite' else w for w in command], **kw)\n"
        "launcher.subprocess.Popen = swap\n"
        f"sys.exit(launcher.launch(launcher.torchrun_args(os.environ), [{word!r}], os.environ))"
    )
    environ = {**os.environ, "NPROC_PER_NODE": "2", "OUT": str(tmp_path), "OMP_NUM_THREADS": "1",
               "PYTHONPATH": f"{ROOT}:{tmp_path}", **variables}  # fmt: skip
    return subprocess.Popen([sys.executable, "-c", code], env=environ, stderr=subprocess.PIPE, text=True)


@pytest.mark.dist
def test_workers_get_the_words_and_their_exit_code_is_passed_on(tmp_path):
    done = start(tmp_path, "ok")
    assert done.wait(60) == 0
    assert sorted(p.read_text() for p in tmp_path.glob("[01]")) == ["2 ok", "2 ok"]
    failed = start(tmp_path, "fail")
    assert failed.wait(60) == 7
    assert "Traceback" not in failed.stderr.read()


@pytest.mark.dist
@pytest.mark.parametrize("patience", [None, "1"])
def test_sigterm_reaches_the_workers_and_leaves_them_time(tmp_path, patience):
    """Workers need three seconds to end; torchrun's own half minute is not a yardstick for a checkpoint."""
    environ = {} if patience is None else {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": patience}
    assert int(launcher.worker_environment(environ)["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) == int(patience or 1800)
    process = start(tmp_path, "wait", **environ)
    deadline = time.time() + 60
    while len(list(tmp_path.glob("*.ready"))) < 2 and time.time() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM
    assert len(list(tmp_path.glob("*.term"))) == (2 if patience is None else 0)


@pytest.mark.dist
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGHUP])
def test_workers_end_with_the_launcher(tmp_path, number):
    """Whatever it dies of; they have time to save."""
    process = start(tmp_path, "wait")
    deadline = time.time() + 60
    while len(list(tmp_path.glob("*.ready"))) < 2 and time.time() < deadline:
        time.sleep(0.1)
    process.send_signal(number)
    assert process.wait(60) == (-number if number == signal.SIGKILL else 128 + number)
    deadline = time.time() + 15
    while len(list(tmp_path.glob("*.term"))) < 2 and time.time() < deadline:
        time.sleep(0.1)
    assert len(list(tmp_path.glob("*.term"))) == 2


def test_a_run_that_a_signal_ended_says_so(monkeypatch):
    route = Route("swiftlite.arguments.plot:PlotArguments", "tests.cli.test_main:stopped", False, "")
    monkeypatch.setitem(ROUTES, ("plot",), route)
    assert main(["plot", "x"]) == 130


def stopped(args):
    return {"signal": signal.SIGINT}


# ---- what is known before torch is imported ----


@pytest.mark.parametrize(
    "words, message",
    [
        (["sft", "--dataset", "d.jsonl"], "give the model with --model"),
        (["infer"], "give the model with --model"),
        (["sft", "--model", "A/B"], "give the training data with --dataset"),
        (["sft", "--model", "A/B", "--dataset", "none.jsonl"], "--dataset none.jsonl: no such file"),
        (["dpo", "--model", "A/B", "--dataset", "d.jsonl", "--template", "qwen33"], "did you mean qwen3"),
        (["sft", "--model", "A/B", "--dataset", "d.jsonl", "--model_type", "qwen33"], "did you mean qwen3"),
        (["sft", "--model", "A/B", "--dataset", "d.jsonl", "--output_dir", "d.jsonl"], "is a file; name a directory"),
        (["sft", "--model", "A/B", "--dataset", "d.jsonl", "--output_dir", "d.jsonl/out"], "is not a directory"),
        (["sft", "--model", "A/B", "--dataset", "d.jsonl", "--report_to", "swanlab"], "pip install swanlab"),
        (["infer", "--model", "A/B", "--attn_impl", "flash_attn"], "flash-attn is not installed"),
        (["infer", "--model", "A/B", "--device_map", "{x"], "--device_map {x: not JSON"),
        (["sft", "--model", "A/B", "--dataset", "d.jsonl", "--target_regex", "(["], "is not a regular expression"),
        (["infer", "--model", "A/B", "--val_dataset", "d.jsonl", "--result_path", "."], "is a directory; name a file"),
        (["megatron", "sft", "--model", "A/B", "--dataset", "d.jsonl"], "pip install 'swiftlite[megatron]'"),
        (["export", "--model", "A/B", "--custom_register_path", "no.py", "--to_mcore", "true"], "existing .py file"),
    ],
)
def test_cheap_mistakes_are_told_first(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d.jsonl").touch()
    monkeypatch.setattr("swiftlite.checkpoint.preflight._installed", lambda module: False)
    monkeypatch.setattr("swiftlite.cli.main._handle", lambda *_: pytest.fail("the command was started"))
    assert main(words) in (1, 2)
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_these_mistakes_import_nothing_heavy():
    code = (
        "import sys\nfrom swiftlite.cli.main import main\n"
        "for words in (['sft', '--dataset', 'x'], ['megatron', 'sft', '--model', 'nowhere', '--dataset', 'A/B'],\n"
        "              ['infer', '--model', 'tests'], ['verify', 'tests', 'docs'], ['export', '--to_hf', 'true']):\n"
        "    assert main(words) in (1, 2)\n"
        "heavy = {'torch', 'transformers', 'numpy', 'datasets'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_did_you_mean_names_no_flag_that_is_refused(capsys):
    assert main(["sft", "--model", "A/B", "--mcore_ref_mode", "x"]) == 2
    assert "mcore_ref_model" not in capsys.readouterr().err
