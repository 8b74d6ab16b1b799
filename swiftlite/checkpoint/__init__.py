"""What a directory or hub id is: its files, config, model type and weight map. Reads no weights."""
