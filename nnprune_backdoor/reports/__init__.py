"""Results of a purification or scan, and pages in Markdown and HTML made from them."""

from .document import document
from .purified import Purified
from .record import Given, Record
from .report import Report
from .scan_page import scan_to_html, scan_to_markdown

__all__ = [
    "Given",
    "Purified",
    "Record",
    "Report",
    "document",
    "scan_to_html",
    "scan_to_markdown",
]
