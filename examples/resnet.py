"""ResNet: half of the channels lie on the residual stream.

What one block writes to the stream is added to what the others wrote. A channel of the stream is
silenced at once, but leaves the tensors only when every block that writes to it is silent there.
The inner channels of a block leave the tensors whenever they are silent.

    python examples/resnet.py                    # trains a small network first
    python examples/resnet.py --weights FILE --clean FOLDER --arch resnet50
"""

from _shared import prepare, show

from nnprune_backdoor import purify
from nnprune_backdoor.demo import Demo

SMALL = Demo(arch="resnet18", width=0.5)

if __name__ == "__main__":
    given = prepare(__doc__, SMALL)
    settings = given.unless_quick(method="tac", selector="trigger", repair="unlearn")
    show(given, purify(given.model, given.clean, **settings))
