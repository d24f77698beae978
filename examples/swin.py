"""Swin: a vision transformer whose attention looks at windows.

As in a ViT, silent hidden units of the MLPs are removed, and channels of the residual stream stay,
silenced. Between stages, patch merging puts four neighbours side by side and normalises over the
channels of all four, so these stay too.

    python examples/swin.py                    # trains a small network first
    python examples/swin.py --weights FILE --clean FOLDER --arch swin_small_patch4_window7_224
"""

from _shared import ADAMW, prepare, show

from nnprune_backdoor import purify
from nnprune_backdoor.demo import Demo

SIZES = {"img_size": 32, "patch_size": 2, "window_size": 4}
WIDTHS = {"embed_dim": 48, "depths": (2, 2, 2), "num_heads": (2, 4, 8)}
SMALL = Demo(
    arch="swin_tiny_patch4_window7_224", width=1, settings=SIZES | WIDTHS, lr=0.002, **ADAMW
)

if __name__ == "__main__":
    given = prepare(__doc__, SMALL)
    settings = given.unless_quick(method="tac", selector="trigger", repair="unlearn")
    show(given, purify(given.model, given.clean, **settings))
