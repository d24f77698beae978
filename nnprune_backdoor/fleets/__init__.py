"""One job for each of many models, by any executor: taken up again, and shared between processes."""

from .fleet import Fleet, Row, run_many
from .jobs import Job, Outcome

__all__ = ["Fleet", "Job", "Outcome", "Row", "run_many"]
