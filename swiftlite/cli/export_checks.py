"""What `export` checks at its end: what was written computes what the source computes, or is near it (`--fp8`)."""

from __future__ import annotations

import shutil
from pathlib import Path

from swiftlite.arguments.export import ExportArguments
from swiftlite.checkpoint.checkpoint import Checkpoint
from swiftlite.cli.export_sources import base_model
from swiftlite.convert.conversion import Options, convert
from swiftlite.convert.mcore import McoreTarget
from swiftlite.convert.quantised import check_rounding
from swiftlite.utils.dist import barrier, get_rank
from swiftlite.utils.errors import UncheckedError, VerifyError
from swiftlite.weights.storage import WeightSource


def check_model(args: ExportArguments, written: Path, hf: Checkpoint | None, mcore_dir: Path) -> None:
    """hf: the Hugging Face side; None: what was written."""
    if not args.test_convert_precision:
        return
    try:
        from swiftlite.selftest.precision import check_precision, groups_of_check

        hf = hf or Checkpoint.open(written)
        with groups_of_check(hf.root):
            if get_rank() == 0:
                check_precision(hf, mcore_dir, args, args.written_dtype)
            barrier()
    except VerifyError:
        raise
    except Exception as error:  # transformers and remote code fail in any way there is
        raise UncheckedError(
            f"converted, but the precision check could not run: {' '.join(str(error).split())}. The result is kept in "
            f"{written}: the same command checks it again, without --test_convert_precision it becomes the output"
        ) from error


def check_adapter(args: ExportArguments, given: Path, written: Path) -> None:
    """The model with the adapter that was given, by transformers, and with the one that was written, by megatron-core."""
    if not args.test_convert_precision:
        return
    scratch = written.with_name(f"{written.name}.check")
    try:
        convert(base_model(args, written), McoreTarget(), scratch, Options(exist_ok=True, quiet=True))
        check_model(args, written, base_model(args, given), scratch)
    finally:
        barrier()
        if get_rank() == 0:
            shutil.rmtree(scratch, ignore_errors=True)


def check_fp8(args: ExportArguments, source: WeightSource, written: Path) -> None:
    """Each number that `export --fp8` has rounded is near what it was. Collective."""
    if args.fp8 and args.verify != "none":
        check_rounding(source, written)
