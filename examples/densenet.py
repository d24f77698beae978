"""DenseNet: every layer reads the outputs of all earlier layers of its block.

A norm layer that follows one convolution has the neurons; one that follows the concatenation of
many outputs has none, and there the convolutions' outputs are the neurons. A silent output is one
slice of every later concatenation, and removing it narrows every layer that reads one of these.

    python examples/densenet.py                    # trains a small network first
    python examples/densenet.py --weights FILE --clean FOLDER --arch densenet161
"""

from _shared import prepare, show

from nnprune_backdoor import purify
from nnprune_backdoor.demo import Demo

SMALL = Demo(
    arch="densenet121",
    width=1,
    settings={"growth_rate": 12, "block_config": (3, 3, 3, 3)},
)

if __name__ == "__main__":
    given = prepare(__doc__, SMALL)
    settings = given.unless_quick(method="tac", selector="trigger", repair="unlearn")
    show(given, purify(given.model, given.clean, **settings))
