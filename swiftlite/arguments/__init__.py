"""Command-line arguments: one hierarchy of dataclasses, and their parser. Imports no torch."""
