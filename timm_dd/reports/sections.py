"""The sections of the page: each from a run's record, or from what its networks say of some images."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Sequence
from typing import Any

from ..storage import files
from ..version import __version__
from . import blocks, boxes, curves, outcome
from .page import Section
from .record import Record

OF_ONE_RUN = ("seed", "experiment", "output", "resume", "config", "part_threads", "workers", "device")
BARE = "There is no plan here, so nothing says where the blocks of the parts lie."


def happened(record: Record) -> Section:
    """The final table, how much sooner the pipeline was as good as the baseline, and warnings."""
    section = Section("happened", "What happened", warnings=outcome.warnings(record))
    plan = record.plan
    if plan is not None:
        verdict = "exact" if plan.exact else f"approximate in {len(plan.approximations)} places"
        section.texts.append(
            f"{plan.model or 'A module'} in {plan.parts} parts, {plan.domain}, {verdict}; "
            f"{plan.params():,} parameters, {plan.params(0):,} in part 0."
        )
    elif record.about:
        made = record.about.get("parts", "some"), record.about.get("domain", "a domain that is not noted")
        section.texts.append("A model composed of {} parts, {}.".format(*made))
    if record.summary is None:
        section.missing.append("No training run has ended here, so there is no final table.")
        return section
    table = list(outcome.rows(record.summary, record.epochs()))
    section.tables.append([outcome.HEADING, *(row.cells() for row in table)])
    section.texts.append(outcome.sooner(curves.rows(record)))
    return section


def learning(record: Record) -> Section:
    """Accuracy and loss over epochs and seconds."""
    section = Section("curves", "Curves")
    table = curves.rows(record)
    if not table:
        section.missing.append("Nothing was trained here: there are no curves.")
        return section
    section.drawings += [curves.curve(table, value, over) for value in curves.VALUES for over in curves.AXES]
    if not any(row["stage"] == "baseline" for row in table):
        section.missing.append("There is no baseline among them; --baseline trains one.")
    return section


def compared(groups: Sequence[tuple[str, Record]]) -> Section:
    """Runs side by side, those of one group under one name."""
    section = Section("compared", "Runs side by side")
    table = [{**row, "group": name} for name, record in groups for row in curves.rows(record)]
    rows = [("run", "group", "seed", "composed, fine-tuned, %", "baseline, %")]
    for name, record in groups:
        known = record.summary or {}
        ends = [f"{known[key]:.2f}" if key in known else "" for key in ("tuned", "baseline")]
        rows.append((record.name, name, str(record.args.get("seed", "")), *ends))
    section.tables.append(rows)
    if not any(row["stage"] in ("composed", "baseline") for row in table):
        section.missing.append("None of them has been fine-tuned yet, so there are no curves to compare.")
        return section
    section.drawings += [curves.bands(table, value, over) for value in curves.VALUES for over in curves.AXES]
    return section


def times(record: Record) -> Section:
    """Seconds of the stages."""
    section = Section("times", "Times")
    table = curves.times(record)
    if not table:
        section.missing.append("Nothing was trained here: no seconds were counted.")
        return section
    section.drawings.append(curves.time_bars(table))
    if not any("waiting" in row for curve in record.curves for row in curve.rows):
        section.missing.append("This run did not note what waiting for data and evaluation took.")
    return section


def sight(record: Record, image: Any) -> Section:
    """The boxes of the parts on an image, or on grey."""
    section = Section("boxes", "What the parts see")
    if record.plan is None:
        section.missing.append("There is no plan here, so nothing says what the parts saw.")
        return section
    section.drawings.append(boxes.boxes(record.plan, image))
    if image is None and len(record.plan.input_size) == 3:
        section.missing.append("The boxes are on grey: no image was given.")
    return section


def weights(record: Record) -> Section:
    """The composed network's blocks, before and after fine-tuning."""
    section = Section("weights", "The composed network")
    places = [record.models.get(name) for name in ("composed", "tuned")]
    if record.plan is None:
        section.missing.append(BARE)
    elif places == [None, None]:
        section.missing.append("The parts have not been composed yet: there are no blocks to look at.")
    elif not blocks.middle(record.plan):
        section.missing.append("No weight is cut along both axes, so there are no blocks.")
    if section.missing:
        return section
    table = blocks.rows(record.plan, *(None if p is None else files.load_state(p) for p in places))
    section.drawings.append(blocks.maps(table))
    if all(row["moved"] is not None for row in table):
        section.drawings.append(blocks.moved(table))
    else:
        section.missing.append("There is no fine-tuned model beside the composed one, so nothing has moved.")
    return section


def again(record: Record) -> Section:
    """Command, versions, seed and plan."""
    section = Section("again", "How to do it again")
    made = {k: v for k, v in record.about.items() if k in ("timm_dd", "timm", "plan", "run")}
    rows = [("", "")]
    rows += [("seed", str(record.args["seed"]))] if "seed" in record.args else []
    rows += [(f"{name}, of the model's file", text) for name, text in made.items()]
    versions = {name: importlib.metadata.version(name) for name in ("torch", "timm")}
    rows += [("this page by", f"timm_dd {__version__}, " + ", ".join(f"{n} {v}" for n, v in versions.items()))]
    rows += [("Python", platform.python_version())]
    section.tables.append(rows)
    if record.summary is not None and "command" in record.summary:
        section.pre.append(("Command", str(record.summary["command"])))
    elif record.args:
        section.missing.append("The run is not done, so its command is not noted yet; args.yaml has its options.")
    else:
        section.missing.append("No training run made this, so there is no command to repeat.")
    if record.plan is not None:
        section.pre.append(("Plan", record.plan.text()))
    return section


def grouped(records: Sequence[Record]) -> list[tuple[str, Record]]:
    """Each with the name of its group: those whose options differ in the seed alone are one."""
    kinds: dict[str, list[Record]] = {}
    for record in records:
        options = {name: value for name, value in record.args.items() if name not in OF_ONE_RUN}
        kinds.setdefault(json.dumps(options, sort_keys=True, default=str), []).append(record)
    names = {key: of[0].name for key, of in kinds.items()}
    return [(names[key], record) for key, of in kinds.items() for record in of]
