"""VGG: a chain of convolutions without residual sums, so every silent channel can be removed.

timm builds the fully connected layers of the head as convolutions, so their outputs are neurons
too. They are narrow in the network that is trained here (mlp_ratio); otherwise they would take
nine tenths of the work.

    python examples/vgg.py                    # trains a small network first
    python examples/vgg.py --weights FILE --clean FOLDER --arch vgg16_bn
"""

from _shared import prepare, show

from nnprune_backdoor import purify
from nnprune_backdoor.demo import Demo

SMALL = Demo(arch="vgg11_bn", width=1, settings={"mlp_ratio": 0.03}, epochs=4, lr=0.05)

if __name__ == "__main__":
    given = prepare(__doc__, SMALL)
    settings = given.unless_quick(method="tac", selector="trigger", repair="unlearn")
    show(given, purify(given.model, given.clean, **settings))
