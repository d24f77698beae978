"""`python -m nnprune_backdoor` is the command line."""

import sys


def run() -> int:
    """Run the command line; 130 where it is interrupted, also during imports."""
    try:
        from .cli.main import main

        return main()
    except KeyboardInterrupt:
        print("nnprune-backdoor: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(run())
