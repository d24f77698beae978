"""The commands of the command line, one file each: `add` makes the parser, `run` does the work."""
