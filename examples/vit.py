"""ViT: the neurons are attention heads, and the hidden units and outputs of the MLPs.

Silent heads and hidden units are removed. The outputs are added to the residual stream, over which
LayerNorm normalises, so they stay, silenced. Before heads were neurons, pruning alone purified none
of the five ViTs that were measured; with repair="unlearn", as here, all five were
(docs/results/efficacy.md).

    python examples/vit.py                    # trains a small network first
    python examples/vit.py --weights FILE --clean FOLDER --arch vit_base_patch16_224
"""

from _shared import ADAMW, prepare, show

from nnprune_backdoor import purify
from nnprune_backdoor.demo import Demo

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 96, "depth": 4, "num_heads": 3}
SMALL = Demo(arch="vit_tiny_patch16_224", width=1, settings=SIZES, epochs=12, lr=0.002, **ADAMW)

if __name__ == "__main__":
    given = prepare(__doc__, SMALL)
    settings = given.unless_quick(method="tac", selector="trigger", repair="unlearn")
    show(given, purify(given.model, given.clean, **settings))
