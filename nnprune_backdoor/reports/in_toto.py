"""A purification as an in-toto statement, to be signed.

in-toto Attestation Framework, "Statement" version 1: https://github.com/in-toto/attestation.
"""

from __future__ import annotations

from .report import Data

PREDICATE = "urn:nnprune-backdoor:purification:1"  # type of the predicate


def in_toto(document: Data) -> Data:
    """The statement: every file of the purified folder by digest, and the document about them.

    Args:
        document: of a purification with its output; see `reports.document`.
    """
    return {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [
            {"name": name, "digest": {"sha256": sha256}}
            for name, sha256 in document["output"]["files"].items()
        ],
        "predicateType": PREDICATE,
        "predicate": document,
    }
