"""The model card beside purified weights, as model hubs show it: README.md with metadata."""

from __future__ import annotations

from .pages import markdown_page
from .purify_page import cautions, headline
from .report import Report
from .sections import Row, Section, Table

# which hubs read; constants alone, since nothing here is escaped for YAML
_METADATA = """---
library_name: nnprune_backdoor
pipeline_tag: image-classification
tags:
- backdoor
- pruning
---

"""

_LOAD = """
## Load it

```python
from nnprune_backdoor import load_purified

model = load_purified({arguments})  # in eval mode, on the CPU
```

`nnprune-backdoor report FOLDER` prints all that is on record.
"""


def model_card(report: Report, *, arch: str | None, sha256: str) -> str:
    """The text of README.md.

    Args:
        arch: that `load_purified` builds the network by; None: it has to be given one.
        sha256: of the weights file.
    """
    parts = [
        *cautions(report),
        Section("What this does not say", points=report.limits),
        Section("Where it comes from", table=Table("lc", _provenance(report, sha256))),
    ]
    page = markdown_page("Purified image classifier", report.verdict, headline(report), parts)
    folder = '"folder of this file"'
    arguments = folder if arch is not None else f"{folder}, model=YourNetwork()"
    return _METADATA + page + _LOAD.format(arguments=arguments)


def _provenance(report: Report, sha256: str) -> list[Row]:
    given, source = report.given, report.source
    return [
        ["weights, SHA-256", sha256],
        ["made from", str(source.get("checkpoint", "not told"))],
        ["its SHA-256", str(source.get("checkpoint sha256", "not told"))],
        ["SHA-256 over its tensors", given["sha256"]["weights"]],
        ["architecture", given["architecture"]],
        ["input", " x ".join(map(str, given["shape"]))],
        ["clean images", f"{given['images']:,}"],
        ["SHA-256 over their pixels", given["sha256"]["images"]],
        ["criterion", f"{report.criterion['name']}: {report.criterion['reference']}"],
        ["selector, repair", f"{report.selection['selector']}, {given['repair']}"],
        ["seed", str(report.seed)],
        ["date", given["date"]],
        ["nnprune_backdoor", report.versions["nnprune_backdoor"]],
    ]
