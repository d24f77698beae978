"""ViT: the neurons are the hidden units of the MLPs and the channels of the residual stream.

Hidden units are removed when silent. Channels of the stream stay, silenced, since LayerNorm reads
them; attention itself is never pruned. Pruning alone purified none of the five ViTs that were
measured, pruning with repair all five (docs/results/efficacy.md).

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
