"""`swiftlite rlhf --rlhf_type gkd`: a student learns a teacher's next-token distributions on the answers of a dataset.

Off-policy: the answers are those of the data. Rows, packing, streaming and loss weights are as in sft.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import transformers

from swiftlite.arguments.preference import DpoArguments
from swiftlite.checkpoint.resolve import as_arguments
from swiftlite.llm.dataset.taught import load_taught
from swiftlite.llm.dataset.teacher import TeacherLogits
from swiftlite.llm.model.loader import embedding_rows
from swiftlite.llm.model.tuner import frozen, prepare_model
from swiftlite.llm.pipeline import read_model
from swiftlite.llm.template.collate import sample_lengths
from swiftlite.llm.train.batches import Collate
from swiftlite.llm.train.begin import started
from swiftlite.llm.train.distillation import Distillation, GkdTrainer, TaughtCollator
from swiftlite.llm.train.run import run
from swiftlite.train.reference import check_teacher_rows, divergence
from swiftlite.utils.types import Json


def gkd_main(args: DpoArguments | Sequence[str]) -> Json:
    """Distil; the same command again resumes where it stopped. Called on every rank.

    Args: args: an arguments object, or words as typed.
    Returns: the last log line's values, `iteration`, `seconds`, `output_dir`.
    Raises: SwiftliteError for everything a user can fix.
    """
    args = as_arguments(DpoArguments, args)
    with started(args, load_taught) as (model, template, data, start):
        known: TeacherLogits | None = getattr(data[0], "teacher", None)
        own, teacher = embedding_rows(model), None
        collate: Collate = template.data_collator
        if known is not None:
            collate, rows = TaughtCollator(template, known), min(own, known.rows)
        else:
            teacher, tokenizer = read_model(args, str(args.teacher_model))
            rows = min(own, embedding_rows(teacher))
            check_teacher_rows(str(args.teacher_model), rows, tokenizer.get_vocab())
            teacher = frozen(teacher)
        transformers.set_seed(args.seed)  # adapters begin the same on all ranks
        objective = Distillation(divergence(args), teacher, rows, args.sft_alpha)
        model = prepare_model(model, args)
        return run(GkdTrainer(args, model, template, objective, collate, sample_lengths), data, start)
