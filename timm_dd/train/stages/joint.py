"""The joint stage: the parts learn to decide together, before they are one network.

After their own epochs the parts train for a few on whole images at full size against the loss of their *sum* of logits.
By (2.16) that sum is the composed network, so each part's gradient is the composed network's inside its blocks, the
weights between them frozen at zero; it costs a K-th of the composed network's multiply-adds. All that parts exchange is
a batch's logits: within a process as they are, between ranks by one all-reduce of B x C numbers a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.distributed as dist

from ..engines import Engine, engine
from ..epochs.checkpoints import SharedTimer, restore_together
from ..epochs.loop import TrainingLoop
from ..images import data
from ..ranks.cores import cores_of_rank
from ..settings import options
from ..updates import schedule
from ..updates.layout import precise
from ..updates.learner import Learner, within_memory
from .context import Context, learner_of, load_trained
from .parts import finish_part


class Joint(Engine):
    """Learners that have one loss, that of the sum of their logits.

    Args:
        by: how they take their forward and backward passes.
        group: of ranks that have other parts of the same network, and the same batches; None if there are none.
    """

    def __init__(self, by: Engine, group: dist.ProcessGroup | None = None):
        self.by, self.group, self.alone = by, group, group is None

    def scores(self, learners: Sequence[Learner], x: torch.Tensor) -> Sequence[torch.Tensor]:
        """The sum of all, for each."""
        return [self._sum(self.by.scores(learners, x))] * len(learners)

    def step(self, learners: Sequence[Learner], x: torch.Tensor, y: torch.Tensor, isolate_failures: bool) -> None:
        gradients = partial(self.gradients, learners, [n.view(x) for n in learners], y)
        losses = gradients() if self.group else within_memory(learners, gradients, len(y))  # ranks halve no batch alone
        self.update(learners, losses, len(y))

    def gradients(
        self, learners: Sequence[Learner], seen: Sequence[torch.Tensor], y: torch.Tensor
    ) -> Sequence[torch.Tensor]:
        """The loss of a batch, for each; its gradients are added up over the micro-batches."""
        first = learners[0]
        total = torch.zeros((), device=first.device)
        for n in learners:
            n.optimizer.zero_grad()
        for i, (y_i, *seen_i) in enumerate(first.chunks(y, *seen)):
            logits = self.by.logits(learners, seen_i, i)
            together = self._sum([z.detach() for z in logits]).requires_grad_()
            loss = first.criterion(together, y_i) * (len(y_i) / len(y))
            (gradient,) = torch.autograd.grad(loss, together)
            self.by.backward(learners, logits, gradient)
            total += loss.detach()
        return [total] * len(learners)

    def apply_gradients(self, learners: Sequence[Learner], isolate_failures: bool = False) -> None:
        self.by.apply_gradients(learners, isolate_failures)

    def average(self, learners: Sequence[Learner]) -> None:
        self.by.average(learners)

    def _sum(self, logits: Sequence[torch.Tensor]) -> torch.Tensor:
        """Over all parts of all ranks; in float64, where the order of float32 numbers does not matter."""
        total = torch.stack(list(logits)).to(precise(logits[0].device)).sum(0)
        if self.group is not None:
            dist.all_reduce(total, group=self.group)
        return total.to(torch.promote_types(logits[0].dtype, torch.float32))

    def __exit__(self, *error: object) -> None:
        self.by.__exit__(*error)


def train_joint(run: Context) -> tuple[float, float]:
    """Train the parts together, each rank those it has trained before; returns the accuracy of their sum on whole
    images, and seconds.

    Raises:
        TrainError: the loss is not finite, or the process was asked to stop.
    """
    stage, ranks = run.folder.joint, run.ranks
    if ranks.primary:
        run.folder.write_plan(stage, run.whole.plan)
    run.sharing.share(stage.path, of_all=True)
    if stage.done:
        for k in range(run.args.parts):
            stage.check(k)
    else:
        group = dist.new_group(list(range(min(ranks.world, run.args.parts)))) if ranks.world > 1 else None
        if run.mine:
            _train(run, run.mine, group)
        run.meeting.gate(run.stop_if_asked)
        run.sharing.share(stage.path, of_all=True)
    done = stage.summaries()
    return done[0]["top1"], max(part["seconds"] for part in done)


def _train(run: Context, mine: Sequence[int], group: dist.ProcessGroup | None) -> None:
    args, stage = options.stage_options(run.args, "joint"), run.folder.joint
    torch.set_num_threads(run.args.part_threads)
    loaders = run.loaders(args, distributed=False)
    load_trained(run.folder.parts, run.whole)
    learners = [_learner(run, k, len(loaders[0])) for k in mine]
    restore_together(learners, partial(_common, group=group))
    timer = run.timer if group is None else SharedTimer(run.timer, group)
    with engine(
        args.engine, learners, run.device, cores_of_rank(run.ranks.local_world), partial(Joint, group=group)
    ) as by:
        shared = (run.seed, timer, by, run.trackers)
        TrainingLoop("joint", loaders, schedule.epochs(args), *shared, reports=run.ranks.primary, shared=False).fit(
            learners
        )
    for k, learner in zip(mine, learners):
        finish_part(run, stage, run.whole.plan, k, learner, loaders)


def _learner(run: Context, k: int, updates: int) -> Learner:
    args = options.stage_options(run.args, "joint", k)
    batch, folder = data.images_of_an_update(args), run.folder.joint.part(k)
    return learner_of(run, f"joint part {k}", run.whole[k], None, args, updates, batch, k, folder)


def _common(found: set, group: dist.ProcessGroup | None) -> set:
    """What all ranks have found."""
    if group is None:
        return found
    everywhere: list = [None] * dist.get_world_size(group)
    dist.all_gather_object(everywhere, found, group=group)
    return set.intersection(*everywhere)
