"""A job for each of many models, by any executor: taken up again, shared between processes."""

from .fleet import Fleet, run_many
from .jobs import Job, Outcome
from .table import Row

__all__ = ["Fleet", "Job", "Outcome", "Row", "run_many"]
