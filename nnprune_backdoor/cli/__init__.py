"""The command line: one file per command, `add` for its options and `run` for the work.

Files of commands import nothing heavy at their top, so that `--help` is quick: torch and all that
needs it are imported when a command runs.
"""
