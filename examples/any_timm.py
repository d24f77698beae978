"""Any architecture of timm: neurons are found by watching one forward pass, not by layer names.

    python examples/any_timm.py --arch regnetx_002          # trains the network first
    python examples/any_timm.py --arch regnety_032 --weights FILE --clean FOLDER

It is trained on images of 32 x 32 pixels, which is too small for some architectures. What to expect
of each family of timm is in docs/results/timm_coverage.md.
"""

from _shared import ADAMW, prepare, show
from torch import nn

from nnprune_backdoor import purify
from nnprune_backdoor.demo import Demo
from nnprune_backdoor.errors import CheckpointError
from nnprune_backdoor.files.architecture import create


def demo(arch: str) -> Demo:
    """For images of 32 x 32 pixels; trained by SGD if there is BatchNorm, else by AdamW."""
    settings = {"img_size": 32}
    try:
        model = create(arch, settings)
    except CheckpointError:  # most convolutional networks take any size and no such argument
        settings = {}
        model = create(arch, settings)
    if any(isinstance(layer, nn.BatchNorm2d) for layer in model.modules()):
        return Demo(arch=arch, width=1, settings=settings)
    return Demo(arch=arch, width=1, settings=settings, epochs=12, lr=0.002, **ADAMW)


if __name__ == "__main__":
    given = prepare(__doc__, demo)
    settings = given.unless_quick(method="tac", selector="trigger", repair="unlearn")
    show(given, purify(given.model, given.clean, **settings))
