"""From one checkpoint format to another, and two directories compared. Imports torch, no model library."""
