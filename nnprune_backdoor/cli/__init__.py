"""The command line. Each command is a file here: `add` makes its parser, `run` does the work."""
