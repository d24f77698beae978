"""EfficientNet: MobileNet's inverted residual blocks, scaled up.

The inner channels of a block are removed together with their depthwise filters. The outputs of
the blocks are added to each other; channels there mostly stay, silenced. The network that is
trained here is a Lite one, without squeeze-and-excite gates.

    python examples/efficientnet.py                    # trains a small network first
    python examples/efficientnet.py --weights FILE --clean FOLDER --arch efficientnet_b0
"""

from _shared import prepare, show

from nnprune_backdoor import purify
from nnprune_backdoor.demo import Demo

SMALL = Demo(arch="tf_efficientnet_lite0", width=1, epochs=6)

if __name__ == "__main__":
    given = prepare(__doc__, SMALL)
    settings = given.unless_quick(method="tac", selector="trigger", repair="unlearn")
    show(given, purify(given.model, given.clean, **settings))
