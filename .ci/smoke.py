"""What the installed package must do: `python -I .ci/smoke.py` (-I: not the source here)."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import timm
import torch

import nnprune_backdoor as nb
from nnprune_backdoor.selectors import LowestFraction

assert "site-packages" in nb.__file__, f"not the installed package: {nb.__file__}"
assert version("nnprune-backdoor") == nb.__version__

command = Path(sys.executable).with_name("nnprune-backdoor")
listed = subprocess.run([command, "list"], check=True, capture_output=True, text=True).stdout
assert all(name in listed for name in nb.list_criteria()), listed

torch.manual_seed(0)
model = timm.create_model("test_resnet", num_classes=3).eval()
clean = nb.CleanData(torch.randn(48, 3, 32, 32), torch.arange(48) % 3)
purified = nb.purify(model, clean, "clp", selector=LowestFraction(0.05), progress=False)
assert len(purified.to_html()) > 5000  # from the templates
assert purified.to_markdown()
with TemporaryDirectory() as scratch:
    folder = nb.save_purified(purified, Path(scratch) / "out", arch="test_resnet")
    with torch.no_grad():
        assert torch.equal(nb.load_purified(folder)(clean.images), purified.model(clean.images))
print(f"nnprune-backdoor {nb.__version__}: installed, and it works")
