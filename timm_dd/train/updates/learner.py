"""A `Learner` is one network in training: its optimizer, schedule and progress, and how it takes an update."""

from __future__ import annotations

import argparse
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from random import Random
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from timm.loss import create_classification_loss
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from ...algebra.view import Box, View
from ...errors import TrainError, headline
from ..settings import options
from ..settings.views import drawn
from . import metrics, optimizers, schedule
from .capture import capturing
from .clipping import clip
from .layout import layout
from .sums import EpochSums

_RANDOM = threading.Lock()  # torch has one random state for all threads


class SeededRandom:
    """Random numbers that follow from a seed and the update's number alone, whoever else draws some."""

    def __init__(self, seed: int, device: torch.device):
        self.seed, self.generator = seed, torch if device.type == "cpu" else torch.get_device_module(device)
        self.drawn = True  # whether the network draws any; if it does not in a step, seeding is not worth its time

    @contextmanager
    def __call__(self, update: int, micro_batch: int) -> Iterator[None]:
        """Seed torch's generator for a forward pass, while no other thread draws, then put it back as it was. Not while
        a graph is captured, whose replays are seeded."""
        if not self.drawn or capturing():
            yield
            return
        with _RANDOM:
            before = self.generator.get_rng_state()
            self.generator.manual_seed(((micro_batch << 52) + (self.seed << 32) + update) % 2**64)
            seeded = self.generator.get_rng_state()
            try:
                yield
                self.drawn = not torch.equal(seeded, self.generator.get_rng_state())
            finally:
                self.generator.set_rng_state(before)


class Sight:
    """What a network sees of a batch, a function of the seeds and the update's number alone.

    Attributes:
        own: its view, or box; None for all of the batch.
        draws: of which it sees one while it trains, update by update; networks of one run that of the same number.
        layout: of the batch in memory, the network's own.
    """

    def __init__(self, own: View | Box | None, args: argparse.Namespace, seed: int, layout: torch.memory_format):
        self.own, self.args, self.seed, self.layout = own, args, seed, layout
        self.draws: Sequence[View | Box | None] = (own,)

    @property
    def sizes(self) -> tuple[tuple[int, ...] | None, ...]:
        """Pixels of what it may see; None for all of the batch."""
        return tuple(v.size if isinstance(v, View) else v and v.extent for v in (self.own, *self.draws))

    def evaluating(self, x: torch.Tensor) -> torch.Tensor:
        return self._of(x, self.own)

    def training(self, x: torch.Tensor, update: int) -> torch.Tensor:
        """In an update; with the probability --roam, of a box anywhere."""
        seen = drawn(self.draws, self.args.seed, update)
        random = Random((self.seed << 32) + update)
        if seen is None or random.random() >= self.args.roam:
            return self._of(x, seen)
        return self._of(x, seen.anywhere(x.shape[2:], random))

    def _of(self, x: torch.Tensor, view: View | Box | None) -> torch.Tensor:
        x = x if view is None else view.crop(x)
        return x if self.layout is torch.contiguous_format else x.contiguous(memory_format=self.layout)


class Learner:
    """One network in training. The dropout of an update follows from `seed` and the update's number, so that learners
    that share a process do not disturb each other, and one that was interrupted goes on as if it had not been; packed
    ones (`engines.Packed`) draw together, by the first one's seed.

    Args:
        sees: of a batch, a view or a box; None for all of it.
        global_batch: images of an update over all ranks, for ``--lr-base``.
        folder: for its ``summary.csv`` and its checkpoints.
        start: the checksums of what it starts from, by name.

    Attributes:
        updates: how many it has taken.
        options: what its weights depend on, the updates of an epoch and the images of an update among them.
        history: loss, top1 (None: not evaluated), lr, seconds since the beginning, and those that were no training, of
            each epoch that ended.
        seconds: of its epochs, validation included, and of what made it ready.
        sight: what it sees of a batch.
        failure: why it cannot go on; None while it can.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        sees: View | Box | None,
        args: argparse.Namespace,
        device: torch.device,
        updates_per_epoch: int,
        global_batch: int,
        seed: int,
        folder: Path,
        start: Mapping[str, str | None] = MappingProxyType({}),
    ):
        held_in = layout(model, args, device)
        model = model.to(device, memory_format=held_in)
        self.name, self.model, self.args, self.device = name, model, args, device
        self.seed, self.folder, self.start = seed, folder, dict(start)
        self.sight = Sight(sees, args, seed, held_in)
        self.options = {
            **options.training_identity(args),
            "updates_per_epoch": updates_per_epoch,
            "images": global_batch,
        }
        self.optimizer = optimizers.create(self.net, args, optimizers.rate(args, global_batch))
        self.schedule = schedule.create(args, self.optimizer, updates_per_epoch)
        self.forward = compiled(model, args)
        self.ema = averaged(self.net, args)
        self.criterion = criterion(args)
        self.loss = lambda logits, x, y: self.criterion(logits, y)
        self.around_step: Callable[[], AbstractContextManager] = nullcontext  # of the optimizer
        self.micro_batches, self.dtype = args.grad_accum_steps, getattr(torch, args.amp_dtype)
        self.scaler = torch.amp.GradScaler(device.type, enabled=optimizers.scales(args))
        self.random = SeededRandom(seed, device)
        self.updates, self.seconds, self.sums = 0, 0.0, EpochSums(device)
        self.history: list[dict[str, float]] = []
        self.failure: str | None = None

    @property
    def net(self) -> nn.Module:
        """The network itself, without DistributedDataParallel."""
        return self.model.module if isinstance(self.model, DistributedDataParallel) else self.model

    @property
    def distributed(self) -> bool:
        """Whether ranks share its batches."""
        return self.model is not self.net

    @property
    def result(self) -> nn.Module:
        """What the training gives: the network, or with --model-ema the moving average of its weights."""
        return self.net if self.ema is None else self.ema.module

    @property
    def lr(self) -> float:
        return max(group["lr"] for group in self.optimizer.param_groups)

    def step(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """One update on a batch."""
        self.update(within_memory([self], partial(self.gradients, self.view(x), y), len(y)), len(y))

    def gradients(self, seen: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """The loss of a batch, of which it has `seen` its view; gradients are added up over the micro-batches."""
        self.optimizer.zero_grad()
        total = torch.zeros_like(self.sums.loss)
        batches = list(self.chunks(seen, y))
        for i, (x_i, y_i) in enumerate(batches):
            later = self.model.no_sync() if self.distributed and i + 1 < len(batches) else nullcontext()
            with later:
                with self.autocast():
                    loss = self.loss(self.training_logits(x_i, i), x_i, y_i) * (len(y_i) / len(y))
                self.scaler.scale(loss).backward()
            total += loss.detach()
        return total

    def chunks(self, *tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
        """The micro-batches of a batch."""
        return zip(*(t.chunk(self.micro_batches) for t in tensors))

    def training_logits(self, seen: torch.Tensor, micro_batch: int) -> torch.Tensor:
        """Of the network on what it has seen of a micro-batch, with the graph to go back through."""
        with self.random(self.updates, micro_batch), self.autocast():
            return self.forward(seen)

    def update(self, loss: torch.Tensor, images: int) -> None:
        """Take a step along the gradients of a batch, whose mean loss was `loss`."""
        self.apply_gradients()
        self.note(loss, images)
        average_weights(self)

    def apply_gradients(self, unscaled: bool = False) -> None:
        """Clip the gradients, which may be `unscaled` already, and step; in float16 only if they are finite."""
        if self.args.clip_grad is not None:
            if not unscaled:
                self.scaler.unscale_(self.optimizer)
            self.sums.clipped += clip(self.model, self.args)
        with self.around_step():
            self.scaler.step(self.optimizer)
        self.scaler.update()

    def note(self, loss: torch.Tensor, images: int) -> None:
        """An update has been taken on a batch, whose mean loss was `loss`."""
        self.updates += 1
        average_statistics(self)
        self.schedule.step_update(self.updates)
        self.sums.add(loss, images)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.args.amp)

    def check_finite(self) -> float:
        """The mean loss of the epoch so far; TrainError if it is not finite."""
        return self.sums.mean(self.name)

    def end_epoch(self, accuracy: float | None, seconds: float, **more: float) -> None:
        """Note the epoch's loss and time, its validation accuracy (None if it was not evaluated) and what `more` was
        found with that, and go on to the next."""
        loss, self.seconds = self.check_finite(), self.seconds + seconds
        more |= self.sums.clipping(self.args, self.options["updates_per_epoch"])
        self.history.append({"loss": loss, "top1": accuracy, "lr": self.lr, "seconds": self.seconds, **more})
        self.sums.clear()
        self.schedule.step(len(self.history), metrics.latest(self.history, self.args))

    def guard(self, work: Callable[[], Any], isolate_failures: bool) -> None:
        """Do `work`; if it fails and failures are isolated, note why."""
        try:
            work()
        except Exception as e:  # whatever ends one part must not end the others
            self.fail(e, isolate_failures)

    def fail(self, error: Exception, isolate_failures: bool) -> None:
        """Note why this one goes no further; raise where failures are not isolated, or fail all."""
        if not isolate_failures or "DataLoader worker" in str(error):  # all need the loader
            raise error
        self.failure = headline(error)
        tqdm.write(f"{self.name} failed: {self.failure}")

    @torch.no_grad()
    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Of the result, on what the network sees when it does not train."""
        with self.autocast():
            return (self.forward if self.ema is None else self.result)(self.sight.evaluating(x)).float()

    def view(self, x: torch.Tensor) -> torch.Tensor:
        """What the network sees of a batch in this update."""
        return self.sight.training(x, self.updates)

    # ---- what a checkpoint holds

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """All that `restore` needs: tensors by name, and JSON. The schedule follows from the history."""
        tensors = self.sums.state() | {f"model.{name}": t for name, t in self.net.state_dict().items()}
        if self.ema is not None:
            tensors |= {f"ema.{name}": t for name, t in self.result.state_dict().items()}
        optimizer_tensors, optimizer_numbers = optimizers.state(self.optimizer)
        return tensors | optimizer_tensors, {
            "options": self.options,
            "start": self.start,
            "updates": self.updates,
            "images": self.sums.images,
            "seconds": self.seconds,
            "history": self.history,
            "optimizer": optimizer_numbers,
            "scaler": self.scaler.state_dict(),
        }

    def restore(self, tensors: dict[str, torch.Tensor], numbers: dict[str, Any]) -> None:
        """Go back to a `state`; RuntimeError, ValueError or KeyError if it is of another network or optimizer."""
        options.check_same(numbers["options"], self.options, longer=True)
        for prefix, net in (("model.", self.net), ("ema.", self.result))[: 1 if self.ema is None else 2]:
            net.load_state_dict({k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)})
        self.history, self.updates = numbers["history"], numbers["updates"]
        for epochs in range(1, len(self.history) + 1):
            self.schedule.step(epochs, metrics.latest(self.history[:epochs], self.args))
        self.schedule.step_update(self.updates)
        longer = numbers["options"]["epochs"] < self.options["epochs"]
        optimizers.restore(self.optimizer, tensors, numbers["optimizer"], keep_rates=longer)
        self.scaler.load_state_dict(numbers["scaler"])
        self.seconds = numbers["seconds"]
        self.sums.restore(tensors, numbers["images"])


def average_weights(learner: Learner) -> None:
    """Take what an update has made of the weights into their moving average."""
    if learner.ema is not None:
        learner.ema.update(learner.net, step=learner.updates)


@torch.no_grad()
def average_statistics(learner: Learner) -> None:
    """With ``--dist-bn reduce``, give ranks that share a network the mean of their running statistics. Taken after each
    update it is the mean of what each would have had in the end, and a checkpoint of one rank has it."""
    if not learner.distributed or learner.args.dist_bn != "reduce":
        return
    held = [t for name, t in learner.net.named_buffers() if name.endswith(("running_mean", "running_var"))]
    if held:
        together = torch.cat([t.flatten() for t in held])
        dist.all_reduce(together)
        for t, mean in zip(held, (together / dist.get_world_size()).split([t.numel() for t in held])):
            t.copy_(mean.view_as(t))


def within_memory(learners: Sequence[Learner], gradients: Callable[[], Any], images: int) -> Any:
    """``gradients()`` of a batch; if they need more memory than there is, once with half the images at a time. Running
    statistics have then seen some images twice.

    Raises:
        TrainError: not even so, or under DistributedDataParallel, which waits for gradients of the whole batch.
    """
    first, names = learners[0], ", ".join(n.name for n in learners)
    try:
        return gradients()
    except torch.OutOfMemoryError as e:
        if images < 2 * first.micro_batches or first.micro_batches > first.args.grad_accum_steps or first.distributed:
            raise _too_large(names, images, first.micro_batches) from e
    for n in learners:
        n.micro_batches *= 2
    at_a_time = -(-images // first.micro_batches)
    tqdm.write(f"{names}: out of memory; goes on with {at_a_time} images at a time, {images} for an update")
    try:
        return gradients()
    except torch.OutOfMemoryError as e:
        raise _too_large(names, images, first.micro_batches) from e


def _too_large(names: str, images: int, micro_batches: int) -> TrainError:
    return TrainError(
        f"{names}: out of memory with {-(-images // micro_batches)} images at a time; use a smaller --batch-size, with "
        "--grad-accum-steps for as many images an update"
    )


def compiled(model: nn.Module, args: argparse.Namespace) -> Callable:
    """By ``--torchcompile``, if that is asked for."""
    if not args.torchcompile:
        return model
    return torch.compile(model, backend=args.torchcompile, mode=args.torchcompile_mode)


def averaged(net: nn.Module, args: argparse.Namespace) -> ModelEmaV3 | None:
    """The moving average of ``--model-ema``, if that is asked for."""
    if not args.model_ema:
        return None
    return ModelEmaV3(net, decay=args.model_ema_decay, use_warmup=args.model_ema_warmup)


def criterion(args: argparse.Namespace) -> nn.Module:
    """timm's loss: mixed images have soft targets, smoothed already."""
    of_bce = {"bce_target_thresh": args.bce_target_thresh, "bce_sum": args.bce_sum, "pos_weight": args.bce_pos_weight}
    return create_classification_loss(
        args.loss,
        smoothing=args.smoothing,
        soft_targets=options.mixes(args),
        poly_epsilon=args.poly_epsilon,
        asl_gamma_pos=args.asl_gamma_pos,
        asl_gamma_neg=args.asl_gamma_neg,
        **of_bce,
    )
