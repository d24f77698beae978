"""What a purification sends through the network, stage by stage, and what is said of it before."""

from __future__ import annotations

from ..core.passes import Task, Work
from ..core.plan import announce
from ..training.repair import REPAIR
from ..utils.progress import say
from .job import Job

_COMPARED = 10  # times that the measuring images are predicted, about

_REMOVING = 500  # images forward: a few each for tracing and for every cut that is tried, about


def planned(job: Job) -> dict[str, float | None]:
    """Say what will be done, and how long each stage should take; timed only where it is said."""
    prepared, options = job.prepared, job.options
    model, sites, images = prepared.model, prepared.sites, prepared.clean.images
    neurons = sum(site.channels for site in sites)
    task = Task.of(model, images, prepared.classes, neurons)
    scoring, selecting, measuring = map(len, job.parts)
    what = (
        f"purifying: {neurons:,} neurons in {len(sites)} layers, {prepared.classes:,} labels, "
        f"{len(images):,} images ({scoring:,} to score, {selecting:,} to select, "
        f"{measuring:,} to measure)"
    )
    kept, files = job.kept, options.kept_in
    for kind, there, file in (
        ("scores are", kept.scores, files.scores),
        ("the selection is", kept.selection, files.selection),
    ):
        if there is not None:
            say(f"{kind} taken from {file}", options.progress)
    return announce(
        what,
        passes_of(job, task),
        model,
        images,
        sites,
        seed=job.seed,
        progress=options.progress,
        compute=options.compute,
    )


def passes_of(job: Job, task: Task) -> dict[str, Work | None]:
    """The passes of each stage; None of those that are not known."""
    options = job.options
    scoring, selecting, measuring = (task.part(len(part)) for part in job.parts)
    stages: dict[str, Work | None] = {}
    if job.kept.scores is None:
        stages["scoring"] = options.criterion.passes(scoring)
    if job.kept.selection is None:
        told = options.criterion.recovers_triggers
        stages["selecting"] = options.selector.passes(selecting.told(scoring.images, told))
    if options.repair == "distil":
        both = scoring.images + (selecting.images if job.teaches_selecting else 0)
        stages["repairing"] = job.distillation.passes(task.part(both))
    elif options.repair == "unlearn":
        stages["repairing"] = REPAIR.passes(scoring)
    if options.removal != "none":
        stages["removing"] = (task.forward(_REMOVING),)
    stages["certifying"] = (measuring.forward(_COMPARED * measuring.images),)
    return stages
