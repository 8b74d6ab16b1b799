"""What both trainers share: loss functions, meters, metrics, checkpoints of a run. Imports no model library."""
