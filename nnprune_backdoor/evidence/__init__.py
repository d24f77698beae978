"""Is there a backdoor, and for which label: `scan`, and the kinds of evidence it collects."""

from .diagnosis import Diagnosis
from .exposure import Exposed, expose
from .probability import Evidence, Suspicion
from .relearning import Relearned, Relearning, relearn
from .restoration import Restoration, Restored
from .scanning import Scan, scan

__all__ = [
    "Diagnosis",
    "Evidence",
    "Exposed",
    "Relearned",
    "Relearning",
    "Restoration",
    "Restored",
    "Scan",
    "Suspicion",
    "expose",
    "relearn",
    "scan",
]
