"""What training's own evaluation says of a model: its engine, objective and batches, without an optimizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from swiftlite.arguments.preference import DpoArguments
from swiftlite.arguments.train import SftArguments
from swiftlite.llm.dataset.encoded import EncodedDataset
from swiftlite.llm.dataset.pairs import PairDataset
from swiftlite.llm.model.tuner import attach_adapter, without_cache
from swiftlite.llm.pipeline import prepare_model_template
from swiftlite.llm.template.collate import sample_lengths
from swiftlite.llm.train.measure import sums_of
from swiftlite.llm.train.objectives import by_channel
from swiftlite.llm.train.preference import PairCollator, Preference, pair_lengths
from swiftlite.llm.train.reference import reference_model
from swiftlite.llm.train.trainer import HfTrainer
from swiftlite.train.batches import BatchPlan
from swiftlite.train.channels import Channels
from swiftlite.train.objective import LanguageModeling
from swiftlite.train.reference import pair_loss

ALL = "all"


def losses(args: SftArguments, data: Mapping[str, Sequence[dict[str, object]]]) -> dict[str, dict[str, float]]:
    """Each data set's metrics under the model of the arguments, with its adapter if there is one; ALL: of all rows together.

    Rows that name a `channel` have `loss_CHANNEL` too. One process; nothing is written.
    Args: data: rows in the standard form, with rejected_messages for DpoArguments.
    Raises: DatasetError where too many rows cannot be used.
    """
    model, template = prepare_model_template(args)
    make = PairDataset if isinstance(args, DpoArguments) else EncodedDataset
    sets = {
        name: make(rows, template, max_drop_ratio=args.max_drop_ratio, name=name, num_proc=args.dataset_num_proc)
        for name, rows in data.items()
    }
    reference = reference_model(args, model) if isinstance(args, DpoArguments) and args.ref_model else None
    for adapter in args.adapters:
        model = attach_adapter(model, Path(adapter))
    without_cache(model)
    if isinstance(args, DpoArguments):
        pairs = Preference(pair_loss(args), model, reference, args.has_reference)
        engine = HfTrainer(args, model, template, pairs, PairCollator(template), pair_lengths)
    else:
        named = any("channel" in row for rows in data.values() for row in rows)
        channels = Channels.of(tuple(sets.values())) if named else None  # type: ignore[arg-type]  # any number of parts
        collate = by_channel(template, channels) if channels else template.data_collator
        engine = HfTrainer(args, model, template, LanguageModeling(channels=channels), collate, sample_lengths)
    if reference is not None:
        engine.place(reference)
    engine.bring_model()
    total: dict[str, float] = {}
    found = {}
    try:
        for name, samples in sets.items():
            sums = sums_of(engine, samples, BatchPlan(args.micro_batch_size, 1, 0, 1))
            found[name] = engine.objective.metrics(sums)
            total = {key: total.get(key, 0.0) + value for key, value in sums.items()}
    finally:
        engine.release()
    return {**found, ALL: engine.objective.metrics(total)}
