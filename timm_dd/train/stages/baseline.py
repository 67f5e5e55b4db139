"""The global network from a random start (GNet-R), to compare with."""

from __future__ import annotations

from functools import partial

from ..settings import options
from ..updates import schedule
from . import initial
from .context import Context, check_global, fit, global_learner, last_top5, save_global, shared_loaders


def train_baseline(run: Context) -> tuple[float, float | None, float]:
    """Train the model from a random start (GNet-R); returns its accuracy, top-5 and seconds."""
    args = options.stage_options(run.args, "baseline")
    model = initial.model(args, run.data_config["input_size"][1:], run.model_args)
    initial.set_checkpointing(args, model)
    loaders = shared_loaders(run, args)
    learner = global_learner(run, "baseline", model, args, len(loaders[0]), run.folder.baseline)
    as_files = partial(save_global, run, learner, {}), partial(check_global, run)
    top1 = fit(run, learner, loaders, schedule.epochs(args), "baseline", *as_files)
    return top1, last_top5(learner), learner.seconds
