"""A purification as a CycloneDX 1.6 ML-BOM: what the purified model was made from, and how.

ECMA-424, 1st edition, 2024 (CycloneDX 1.6), with its `modelCard`.
"""

from __future__ import annotations

import json
import uuid
from typing import Any

from .report import Data
from .sections import sentence

_GIVEN, _PURIFIED, _IMAGES = "model-as-given", "model-purified", "clean-images"  # references


def cyclonedx(document: Data) -> Data:
    """The bill of materials, from a document of `reports.document` with its output.

    The model as given is the purified one's ancestor. Hashes are of files; those over tensors are
    properties. The serial number follows from the weights: the same weights, the same number.
    """
    files = document["output"]["files"]
    given, images = document["model"], document["images"]
    ancestor = {
        "type": "machine-learning-model",
        "bom-ref": _GIVEN,
        "name": given["file"] or "model as given",
        **_hashes(given["sha256"]),
        "properties": _properties({"tensors sha256": given["tensors_sha256"]}),
    }
    purified = {
        "type": "machine-learning-model",
        "bom-ref": _PURIFIED,
        "name": document["output"]["folder"],
        "description": sentence(document["verdict"]),
        **_hashes(files["model.safetensors"]),
        "pedigree": {"ancestors": [ancestor], "notes": sentence(document["verdict"])},
        "modelCard": _card(document),
        "properties": _properties(_settings(document)),
    }
    dataset = {
        "type": "data",
        "bom-ref": _IMAGES,
        "name": images["folder"] or "clean images",
        "data": [{"type": "dataset", "name": images["folder"] or "clean images"}],
        "properties": _properties({"images": images["count"], "tensors sha256": images["sha256"]}),
    }
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_OID, files['model.safetensors'])}",
        "version": 1,
        "metadata": {
            **({"timestamp": document["date"]} if document["date"] else {}),
            "tools": {"components": [{"type": "application", **document["tool"]}]},
            "component": purified,
        },
        "components": [dataset],
        "dependencies": [{"ref": _PURIFIED, "dependsOn": [_IMAGES]}, {"ref": _IMAGES}],
    }


def _card(document: Data) -> Data:
    report = document["report"]
    given, accuracy, agreement = report["given"], report["accuracy"], report["agreement"]
    metrics = []
    if accuracy is not None:
        metrics += [
            _metric("clean accuracy", accuracy[when], what)
            for when, what in (("before", "model as given"), ("after", "purified model"))
        ]
    if agreement is not None:
        metrics.append(_metric("same label as the model as given", agreement["same"], "purified"))
    shape = " x ".join(map(str, given["shape"]))
    return {
        "modelParameters": {
            "task": "image classification",
            "modelArchitecture": given["architecture"],
            "datasets": [{"ref": _IMAGES}],
            "inputs": [{"format": f"image, {shape} (channels, height, width)"}],
            "outputs": [{"format": f"logits of {given['classes']} classes"}],
        },
        "quantitativeAnalysis": {"performanceMetrics": metrics},
        "considerations": {
            "technicalLimitations": [*map(sentence, document["cautions"]), *report["limits"]]
        },
    }


def _metric(kind: str, rate: Data, which: str) -> Data:
    low, high = rate["interval"]
    return {
        "type": kind,
        "value": f"{rate['share']:.4f}",
        "slice": f"{which}, {rate['count']} clean images",
        "confidenceInterval": {"lowerBound": f"{low:.4f}", "upperBound": f"{high:.4f}"},
    }


def _settings(document: Data) -> Data:
    report, settings = document["report"], document["settings"]
    chosen = report["selection"]
    return {
        "schema version": document["schema_version"],
        "criterion": report["criterion"]["name"],
        "reference": report["criterion"]["reference"],
        "selector": chosen["selector"],
        **{name: settings[name] for name in ("silencing", "removal", "repair")},
        "neurons silenced": f"{chosen['neurons']} of {chosen['of']}",
        "seed": document["seed"],
        "settings": json.dumps(settings),
        "outcome": document["outcome"],
        **{f"version of {name}": version for name, version in document["versions"].items()},
    }


def _hashes(sha256: str | None) -> Data:
    return {"hashes": [{"alg": "SHA-256", "content": sha256}]} if sha256 else {}


def _properties(values: dict[str, Any]) -> list[Data]:
    return [
        {"name": f"nnprune-backdoor:{name}", "value": str(value)}
        for name, value in values.items()
        if value is not None
    ]
