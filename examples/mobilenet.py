"""MobileNet: inverted residual blocks with depthwise convolutions and squeeze-and-excite gates.

A block widens, filters each channel by itself (depthwise), scales it by a gate, and narrows. A
silent inner channel is removed together with its depthwise filter and its input of the gate. The
narrow ends of the blocks are added to each other; channels there mostly stay, silenced.

    python examples/mobilenet.py                    # trains a small network first
    python examples/mobilenet.py --weights FILE --clean FOLDER --arch mobilenetv3_large_100
"""

from _shared import prepare, show

from nnprune_backdoor import purify
from nnprune_backdoor.demo import Demo

SMALL = Demo(arch="mobilenetv3_small_050", width=1, epochs=10)

if __name__ == "__main__":
    given = prepare(__doc__, SMALL)
    settings = given.unless_quick(method="tac", selector="trigger", repair="unlearn")
    show(given, purify(given.model, given.clean, **settings))
