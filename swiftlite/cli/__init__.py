"""The command line: routes, launcher, error messages."""
