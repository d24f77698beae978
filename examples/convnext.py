"""ConvNeXt: no BatchNorm; LayerNorm normalises over the channels.

The neurons are the hidden units of the MLPs and the outputs of the convolutions. Hidden units are
removed. Channels that a LayerNorm reads stay, silenced: with one channel fewer, their mean and
variance would differ. It is trained by AdamW, as transformers are.

    python examples/convnext.py                    # trains a small network first
    python examples/convnext.py --weights FILE --clean FOLDER --arch convnext_tiny
"""

from _shared import ADAMW, prepare, show

from nnprune_backdoor import purify
from nnprune_backdoor.demo import Demo

SIZES = {"depths": (2, 2, 4, 2), "dims": (24, 48, 96, 192), "patch_size": 2}
SMALL = Demo(arch="convnext_atto", width=1, settings=SIZES, epochs=10, lr=0.004, **ADAMW)

if __name__ == "__main__":
    given = prepare(__doc__, SMALL)
    settings = given.unless_quick(method="tac", selector="trigger", repair="unlearn")
    show(given, purify(given.model, given.clean, **settings))
