"""A run: stage 1 trains the parts, each rank its own and no word between them; stage 2 composes and fine-tunes.

Ranks meet once, when their parts are done: the process group is made then, rank 0 merges the parts' files, and
DistributedDataParallel hands its weights to the others. So ranks need one output folder that all of them see.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import shutil
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import yaml
from safetensors.torch import load_file
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import update_bn

from .. import models
from ..errors import TrainError
from ..planning.plan import Plan
from ..storage import files
from ..storage.atomic import output_folder, remove_temporaries, replace_json
from ..surgery.merge import merge
from ..surgery.parts import Parts
from ..surgery.split import split
from ..text import json_text, table
from . import data, options
from .checkpoints import CheckpointTimer, restore
from .composed import add_noise, between, calibrate, own_rate, reassign, some
from .decoded import decoded
from .engines import Engine, cores, engine, share_cores, share_cores_for_parts
from .learner import Learner
from .loop import TrainingLoop, evaluate
from .trackers import Trackers

WAIT = datetime.timedelta(days=7)  # the first rank to finish its parts waits for the last


@dataclass(frozen=True)
class Ranks:
    """Where this process stands among those that torchrun started."""

    rank: int
    local_rank: int
    world: int
    local_world: int

    @classmethod
    def from_environment(cls) -> Ranks:
        names = (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_WORLD_SIZE", 1))
        return cls(*(int(os.environ.get(name, default)) for name, default in names))

    @property
    def primary(self) -> bool:
        return self.rank == 0

    @property
    def launch(self) -> str | None:
        """What all ranks of one torchrun have in common, and its restarts: its run id, or if it was given none its
        process on this node; None for ranks on several nodes, or without torchrun."""
        given = os.environ.get("TORCHELASTIC_RUN_ID")
        if given == "none":
            return f"pid{os.getppid()}" if self.world == self.local_world else None
        return given

    def device(self, name: str | None) -> torch.device:
        if name == "cpu" or (name is None and not torch.cuda.is_available()):
            return torch.device("cpu")
        index = self.local_rank % max(torch.cuda.device_count(), 1)
        torch.cuda.set_device(index)
        return torch.device("cuda", index)


def train(args: argparse.Namespace) -> dict:
    """A run, or several cycles of it, each from the last one's fine-tuned model; the last one's summary."""
    run = Run(args)
    summary = run.go()
    while run.cycle < args.cycles:
        run = Run(args, run)
        summary = run.go()
    if dist.is_initialized():
        dist.destroy_process_group()
    return summary


class Run:
    """One cycle of a training run; `go` carries it out and returns its summary.

    Args:
        before: the cycle whose fine-tuned model is split; None for a fresh or pretrained one.
    """

    def __init__(self, args: argparse.Namespace, before: Run | None = None):
        self.args, self.ranks, self.begun = args, Ranks.from_environment(), time.time()
        self.cycle = 1 if before is None else before.cycle + 1
        self.seed = args.seed + self.cycle - 1  # of the order of images, and of dropout
        self.device = self.ranks.device(args.device)
        self.train_set, self.val_set, classes = data.datasets(args)
        self.data_name = (args.dataset or Path(args.data_dir).resolve().name).split("/")[-1]
        self.model_args = options.model_arguments(args, classes)
        args.num_classes = self.model_args["num_classes"]
        empty = models.create_empty(args.model, **self.model_args)
        self.data_config = data.data_config(args, empty)
        self.size = tuple(self.data_config["input_size"][1:])
        self.timer = CheckpointTimer(args.checkpoint_every)
        self.resuming = args.resume is not None or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
        self.folder = self._folder() if before is None else before.root / f"cycle-{self.cycle}"
        self.root = self.folder if before is None else before.root
        self.parts_folder, self._decoded = self.folder / "parts", self.root / "decoded"
        self.parts: Parts = split(
            args.model,
            args.parts,
            domain=options.domain(args),
            narrow=args.narrow,
            img_size=self.size,
            pretrained=args.pretrained and before is None,
            seed=args.seed,
            **self.model_args,
        )
        self.parts.plan = replace(self.parts.plan, config=models.config(empty, self.data_config))
        if args.reassign and not self.parts.plan.exact:
            raise TrainError(f"--reassign: {args.model} is not the same with its channels in another order")
        if before is not None:
            state = load_file(before.folder / "global" / "last" / "model.safetensors")
            self.parts.take(reassign(state, self.parts.plan) if args.reassign else state)

    def _folder(self) -> Path:
        """``--experiment`` in ``--output``; by default a new name, on which all ranks agree without a word, or the last
        run that is not done if one is to go on."""
        base, name = Path(self.args.output), f"{self.args.model}-{self.args.parts}"
        if self.args.resume not in (None, "auto"):
            if not (Path(self.args.resume) / "args.yaml").exists():
                raise TrainError(f"--resume {self.args.resume}: no run there; give a run's folder, or auto")
            return Path(self.args.resume)
        if self.args.experiment:
            return base / self.args.experiment
        if self.args.resume is not None:
            begun = [p.parent for pattern in (name, f"{name}-*") for p in base.glob(f"{pattern}/args.yaml")]
            last = "." if self.args.cycles == 1 else f"cycle-{self.args.cycles}"
            begun = [p for p in begun if not (p / last / "summary.json").exists()]
            if begun:
                return max(begun, key=lambda p: p.stat().st_mtime)
        if self.ranks.launch is not None:
            return base / f"{name}-{self.ranks.launch[:8]}"
        if self.ranks.world > 1:
            raise TrainError("ranks on several nodes need one name for the run: --experiment, or torchrun --rdzv-id")
        return next(p for i in itertools.count() if not (p := base / (f"{name}-{i}" if i else name)).exists())

    # ---- stage 1

    def train_parts(self) -> None:
        """Train part k on rank k mod world size, those that are not done. One that fails does not stop the others."""
        mine = [k for k in range(self.args.parts) if k % self.ranks.world == self.ranks.rank]
        own = [k for k in mine if not self._done(k)]
        for k in set(mine) - set(own):
            self._check_done(k)
        if not own:
            return
        args = options.stage_options(self.args, "part")
        share_cores_for_parts(args.engine, args.parts, self.ranks.local_world)
        loaders = data.loaders(args, self.data_config, *self.sets, self.device, distributed=False)
        learners = [self._part(k, self.parts[k], len(loaders[0])) for k in own]
        for learner in learners if self.resuming else ():
            (learner.folder / "failure.json").unlink(missing_ok=True)
            learner.guard(partial(restore, learner), isolate_failures=True)
        with engine(args.engine, learners, self.device, cores() // self.ranks.local_world) as by:
            TrainingLoop(
                "parts", loaders, args.epochs, self.seed, self.timer, by, self.trackers, isolate_failures=True
            ).fit(learners)
        for k, learner in zip(own, learners):
            if learner.failure is not None:
                replace_json(learner.folder / "failure.json", learner.failure)
                continue
            files.save_part(learner.folder, self.parts.plan, k, learner.result.state_dict(), self.seed, args.epochs)
            summary = {
                "part": k,
                "top1": _accuracy(learner, loaders, shared=False),
                "epochs": args.epochs,
                "updates": learner.updates,
                "seconds": learner.seconds,
                "options": learner.options,
            }
            replace_json(learner.folder / "summary.json", summary)

    def _part(self, k: int, model: nn.Module, updates: int) -> Learner:
        args, folder, box = (
            options.stage_options(self.args, "part", k),
            self.parts_folder / str(k),
            self.parts.plan.boxes()[k],
        )
        return self._learner(f"part {k}", model, box, args, updates, data.images_of_an_update(args), k, folder)

    def _done(self, k: int) -> bool:
        return (self.parts_folder / str(k) / "summary.json").exists()

    def _check_done(self, k: int) -> None:
        """Raise TrainError if part k was trained with other options."""
        before, now = (
            self._part_summary(k)["options"],
            options.training_identity(options.stage_options(self.args, "part", k)),
        )
        try:
            options.check_same({name: value for name, value in before.items() if name in now}, now)
        except ValueError as e:
            raise TrainError(
                f"part {k} is done, with other options (for the parts, {e}); use those, "
                f"or remove {self.parts_folder / str(k)} to train it anew"
            ) from e

    def _part_summary(self, k: int) -> dict:
        return json.loads((self.parts_folder / str(k) / "summary.json").read_text())

    def _learner(self, name, model, box, args, updates, batch, stream, folder) -> Learner:
        model = (
            model.to(self.device, memory_format=torch.channels_last) if args.channels_last else model.to(self.device)
        )
        seed = self.seed * 1000 + stream
        learner = Learner(name, model, box, args, self.device, updates, batch, seed, folder)
        folder.mkdir(parents=True, exist_ok=True)
        return learner

    # ---- stage 2

    def meet(self) -> None:
        """Wait until every rank has trained its parts.

        Raises:
            TrainError: some failed.
        """
        if self.ranks.world > 1:
            with self.timer.away():
                if not dist.is_initialized():
                    dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo", timeout=WAIT)
                dist.barrier()
        failed = [k for k in range(self.args.parts) if not self._done(k)]
        if failed and not self.ranks.primary:
            raise SystemExit(1)  # the first rank says why
        if failed:
            reasons = [json.loads((self.parts_folder / str(k) / "failure.json").read_text()) for k in failed]
            raise TrainError(
                f"{'; '.join(f'part {k} failed ({why})' for k, why in zip(failed, reasons))}; "
                f"{self.args.parts - len(failed)} of {self.args.parts} parts are done and kept: --resume {self.folder} "
                f"goes on with what failed, from its last checkpoint, or anew and with other options if "
                f"{self.parts_folder}/k is removed"
            )

    def tune(self) -> dict[str, float]:
        """Compose, take the BatchNorm statistics anew, and fine-tune; returns the accuracies of the parts together and
        of the composed model after each step, and the seconds of the last."""
        composed = self.folder / "composed"
        if self.ranks.primary:
            files.merge_files(self.parts_folder, composed)
        if self.ranks.world > 1:
            dist.barrier()
        parts = Parts.load(self.parts_folder)
        model = merge(parts)
        args = options.stage_options(self.args, None)
        loaders = self._loaders(args)
        together = self._together(parts, loaders[1])
        learner = self._global("composed model", model, args, len(loaders[0]), self.folder / "global")
        found = {"together": together, "composed": evaluate([learner], loaders[1], Engine())[0]}
        start = time.perf_counter()
        data.seed_epoch(self.seed, args.epochs)
        other = self._prepare(learner, parts.plan, loaders[0], args)
        learner.seconds = time.perf_counter() - start
        if other:
            found["updated"] = evaluate([learner], loaders[1], Engine())[0]
        about = files.summary(parts.plan, parts.plan.digest())
        found["tuned"] = self._fit(learner, loaders, args.epochs, "fine-tuning", about)
        found["best"] = max((row["top1"] for row in learner.history), default=found["tuned"])
        return {**found, "seconds": learner.seconds}

    def _prepare(self, learner: Learner, plan: Plan, loader, args) -> bool:
        """Make the composed model ready to be fine-tuned; whether its accuracy may be another."""
        weights = list(between(plan, learner.net)) if args.off_diagonal_noise or args.off_diagonal_lr != 1 else []
        if args.off_diagonal_noise:
            add_noise(weights, args.off_diagonal_noise, self.seed)
        if args.off_diagonal_lr != 1:
            learner.around_step = partial(own_rate, weights, args.off_diagonal_lr)
        anew = args.update_bn and any(isinstance(m, _NormBase) for m in learner.net.modules())
        if anew:
            update_bn(some(loader), learner.model, self.device)
        calibrate(learner.net, plan, args.calibrate, loader, self.device)
        if learner.ema is not None:
            learner.ema.set(learner.net)
        return anew or bool(args.off_diagonal_noise)

    def baseline(self) -> tuple[float, float]:
        """Train the model from a random start (GNet-R); returns accuracy and seconds."""
        args = options.stage_options(self.args, "baseline")
        given = models.arguments(self.args.model, img_size=self.size, **self.model_args)
        model = models.create(self.args.model, pretrained=self.args.pretrained, seed=self.args.seed, **given)
        loaders = self._loaders(args)
        learner = self._global("baseline", model, args, len(loaders[0]), self.folder / "baseline")
        return self._fit(learner, loaders, args.epochs, "baseline", {}), learner.seconds

    def _loaders(self, args) -> tuple:
        share_cores(self.ranks.local_world)
        return data.loaders(args, self.data_config, *self.sets, self.device, distributed=self.ranks.world > 1)

    def _together(self, parts: Parts, loader) -> float:
        """The accuracy of the sum of the parts' logits, each part on its own box."""
        learners = [self._part(k, part, 1) for k, part in enumerate(parts)]
        return evaluate(learners, loader, Engine(), together=True)[-1]

    def _global(self, name: str, model: nn.Module, args, updates: int, folder: Path) -> Learner:
        model = model.to(self.device)
        if self.ranks.world > 1:
            model = DistributedDataParallel(
                model, device_ids=[self.device.index] if self.device.type == "cuda" else None
            )
        batch, stream = data.images_of_an_update(args) * self.ranks.world, 999 - self.ranks.rank
        return self._learner(name, model, None, args, updates, batch, stream, folder)

    def _fit(self, learner: Learner, loaders, epochs: int, title: str, about: dict[str, str]) -> float:
        """Train the global model, keeping the last epoch's weights and the best; returns the last accuracy."""

        def keep() -> None:
            if not self.ranks.primary:
                return
            *before, last = [row["top1"] for row in learner.history] or [0.0]
            config = models.config(learner.result, self.data_config)
            known = {**about, "epoch": str(len(learner.history)), "top1": f"{last:.2f}"}
            for name in ["last", "best"] if last > max(before, default=-1.0) else ["last"]:
                files.save_model(learner.folder / name, learner.result, config, known)

        if self.resuming:
            restore(learner)
        shared = (self.seed, self.timer, Engine(), self.trackers, keep, self.ranks.primary)
        TrainingLoop(title, loaders, epochs, *shared).fit([learner])
        if epochs == 0:
            keep()
        return _accuracy(learner, loaders, shared=True)

    # ---- all of it

    def go(self) -> dict:
        """Both stages, and the baseline if asked for; writes and prints the summary on the first rank."""
        done = self.folder / "summary.json"
        if self.ranks.primary:
            self._open()
        if self.resuming and self.cycle < self.args.cycles and done.exists():
            for k in range(self.args.parts):
                self._check_done(k)
            return json.loads(done.read_text())
        with self.timer, Trackers(self.args, self.folder, self.ranks.rank) as self.trackers:
            try:
                summary = self._stages()
            except RuntimeError:  # other ranks that stop take the process group with them, and workers the loader
                self.timer.check("the last checkpoints are kept")
                raise
        if self.ranks.primary:
            replace_json(done, summary)
            print(
                f"\n{self.report(summary)}\n\n{self.folder}: composed/ before fine-tuning, global/best after",
                flush=True,
            )
        if self.ranks.world > 1:
            dist.barrier()  # the next cycle reads what the first rank wrote
        if self.ranks.primary and self.cycle == self.args.cycles:
            shutil.rmtree(self._decoded, ignore_errors=True)
        return summary

    def _stages(self) -> dict:
        named = {"train": self.train_set, "validation": self.val_set}
        self.sets = [decoded(s, self._decoded / f"{n}.safetensors", self.args.workers) for n, s in named.items()]
        self.train_parts()
        self.meet()
        parts = [self._part_summary(k) for k in range(self.args.parts)]
        tuned = self.tune()
        seconds = {"parts": max(p["seconds"] for p in parts), "composed": tuned.pop("seconds")}
        about = {"command": options.command(self.args), "dataset": self.data_name, "split": self.args.val_split}
        summary = {"parts": [p["top1"] for p in parts], **tuned, "seconds": seconds, **about}
        if self.args.baseline and self.cycle == 1:
            summary["baseline"], summary["seconds"]["baseline"] = self.baseline()
        return summary

    def _open(self) -> None:
        if (self.folder / "args.yaml").exists():
            signature = (self.folder / "args.yaml").read_text().split("\n", 1)[0]
            restarted = self.resuming and self.ranks.launch is not None and signature == self._signature()
            if self.args.resume is None and not restarted:
                raise TrainError(
                    f"{self.folder} holds a run already; go on with --resume, or choose another --experiment"
                )
            if files.PartsFolder(self.folder).digest != self.parts.plan.digest():
                raise TrainError(f"{self.folder} holds a run of another model or split; choose another --experiment")
        described, given = (
            json_text(self.parts.plan.to_json()),
            yaml.safe_dump(vars(self.args), default_flow_style=None),
        )
        with output_folder(self.folder) as aside, output_folder(self.parts_folder) as beside_parts:
            beside_parts(files.PLAN).write_text(described, encoding="utf-8")
            aside(files.PLAN).write_text(described, encoding="utf-8")
            aside("args.yaml").write_text(f"{self._signature()}\n{given}")  # the last to land: with it there is a run
        remove_temporaries(self.folder, self.begun)
        plan = self.parts.plan
        verdict = "exact" if plan.exact else f"approximate in {len(plan.approximations)} places"
        print(
            f"{self.args.model} in {plan.parts} parts, {plan.domain}, {verdict}; "
            f"{plan.params():,} parameters, {plan.params(0):,} in part 0\n"
            f"{len(self.train_set):,} images to train on, {len(self.val_set):,} to validate; "
            f"{self.ranks.world} rank(s) on {self.device.type}; {self.folder}",
            flush=True,
        )

    def _signature(self) -> str:
        """The first line of args.yaml: by it torchrun's second start knows the run of its first."""
        return f"# torchrun {self.ranks.launch}"

    def report(self, summary: dict) -> str:
        """The table that ends a run."""
        epochs = options.stage_options(self.args, "part").epochs
        seconds = summary["seconds"]
        rows = [["", "top-1 %", "epochs", "seconds"]]
        for k, accuracy in enumerate(summary["parts"]):
            rows.append(
                [
                    f"part {k}, its own box",
                    f"{accuracy:.2f}",
                    str(epochs),
                    f"{seconds['parts']:.1f} for all" if k == 0 else "",
                ]
            )
        rows.append(["sum of the parts, own boxes", f"{summary['together']:.2f}", "", ""])
        rows.append(["composed, before fine-tuning", f"{summary['composed']:.2f}", "0", ""])
        if "updated" in summary:
            rows.append(["composed, BatchNorm anew", f"{summary['updated']:.2f}", "0", ""])
        rows.append(
            [
                "composed, after fine-tuning",
                f"{summary['tuned']:.2f}",
                str(self.args.epochs),
                f"{seconds['composed']:.1f}",
            ]
        )
        if "baseline" in summary:
            total = options.stage_options(self.args, "baseline").epochs
            rows.append(
                ["baseline, random start", f"{summary['baseline']:.2f}", str(total), f"{seconds['baseline']:.1f}"]
            )
        return table(rows)


def _accuracy(learner: Learner, loaders, shared: bool) -> float:
    """The accuracy after the last epoch; now, if there was none."""
    if learner.history:
        return learner.history[-1]["top1"]
    return evaluate([learner], loaders[1], Engine(), shared=shared)[0]
