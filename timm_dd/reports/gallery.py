"""The sections of the page for which the networks of a run are shown images."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ..errors import ReportError, SplitError, headline
from . import cam, decisions, features, networks
from .networks import Networks, Samples
from .page import Section
from .record import Record

PICTURES = 4  # images that are shown one by one
NO_IMAGES = "No images were given, so no network was asked about any."
FLAT = "The images have other than two axes, which are no pictures."


def gallery(
    record: Record, samples: Samples | None, layers: Sequence[str] | None, why: str = NO_IMAGES
) -> list[Section]:
    """Feature maps, class activation maps, and who is right; `why` there are no samples, where there are none.

    Raises:
        ReportError: the images are not of the networks' size, or there is no such layer.
    """
    maps, look = Section("maps", "Feature maps"), Section("look", "Where they look")
    right = Section("right", "Who is right")
    why = networks.missing(record) or (why if samples is None else None) or (FLAT if samples.images.ndim != 4 else None)
    if why is not None:
        for section in (maps, look, right):
            section.missing.append(why)
        return [maps, look, right]
    networks.check_size(samples, record)
    nets = Networks(record)
    _tried(maps, lambda: _maps(maps, nets, samples, layers))
    scores: dict[str, torch.Tensor] = {}
    _tried(right, lambda: scores.update(networks.scores(nets, samples.images)))
    _tried(look, lambda: _look(look, nets, samples, scores))
    _tried(right, lambda: _right(right, nets, samples, scores))
    return [maps, look, right]


def _tried(section: Section, fill: Callable[[], None]) -> None:
    """Fill a section; where a network of the user's cannot be shown so, the section says why."""
    try:
        fill()
    except (RuntimeError, TypeError, NotImplementedError, SplitError) as e:
        section.missing.append(f"This network cannot be shown so ({headline(e)}).")


def shown(samples: Samples, count: int) -> list[int]:
    """The images that are shown: of as many classes as there are."""
    if samples.labels is None:
        return list(range(min(count, len(samples.images))))
    firsts = {int(c): i for i, c in reversed(list(enumerate(samples.labels)))}
    others = [i for i in range(len(samples.images)) if i not in firsts.values()]
    return (sorted(firsts.values()) + others)[:count]


def _maps(section: Section, nets: Networks, samples: Samples, layers: Sequence[str] | None) -> None:
    model, parts = nets.whole.get("composed"), nets.trained
    if model is None or parts is None:
        section.missing.append("There is no composed network with its parts here to compare.")
    elif len(parts) < parts.plan.parts or parts.plan.inputs is not None:
        section.missing.append("Some parts are missing, so the composed network is not compared with them.")
    else:
        i = shown(samples, 1)[0]
        table = features.rows(model, parts, samples.images[i : i + 1], 0, layers)
        section.drawings += [features.maps(row, number) for number, row in enumerate(table)]
        if not table:
            section.missing.append("No layer has maps of the part's own channels that can be compared.")


def _look(section: Section, nets: Networks, samples: Samples, scores: dict[str, torch.Tensor]) -> None:
    if not scores:
        section.missing.append("The networks give no scores of classes, so there is no class to look for.")
        return
    chosen = shown(samples, PICTURES)
    x, size = samples.images[chosen], samples.images.shape[2:]
    classes = decisions.decided(scores)
    wanted = (list(classes.values())[-1] if samples.labels is None else samples.labels)[chosen]
    found, views = {}, {}
    for k, part in zip(nets.parts.members, nets.parts) if nets.parts is not None else ():
        view = nets.parts.plan.views()[k]
        found[f"part {k}"], views[f"part {k}"] = _mapped(part, view.crop(x), wanted), view.box
    found |= {name: _mapped(model, x, wanted) for name, model in nets.whole.items()}
    found = {name: maps for name, maps in found.items() if maps is not None}
    if not found:
        section.missing.append("No network has maps of several positions before its scores.")
        return
    for number, i in enumerate(chosen):
        titled = ((networks.WHOLE.get(name, name), name, maps) for name, maps in found.items())
        table = [cam.row(title, maps, number, size, views.get(name)) for title, name, maps in titled]
        section.drawings.append(cam.look(table, samples.picture(i), samples.name(int(wanted[number])), number))


def _mapped(network: torch.nn.Module, x: torch.Tensor, classes: torch.Tensor) -> cam.Maps | None:
    try:
        return cam.maps(network, x, classes)
    except ReportError:
        return None


def _right(section: Section, nets: Networks, samples: Samples, scores: dict[str, torch.Tensor]) -> None:
    if not scores:
        section.missing.append("The networks give no scores of classes, so there is nothing to be right about.")
        return
    section.texts.append(f"On {samples.source}.")
    views = {} if nets.parts is None else {f"part {k}": nets.parts.plan.views()[k] for k in nets.parts.members}
    for number, i in enumerate(shown(samples, PICTURES)):
        table = decisions.rows(scores, samples.labels, i)
        section.drawings.append(decisions.on_image(table, samples, i, views, number))
    chosen = decisions.decided(scores)
    section.drawings.append(decisions.agreements(chosen))
    if "dnn" not in scores and nets.parts is not None:
        section.missing.append("There is no dense network on the parts' probabilities; --aggregate dnn trains one.")
    if samples.labels is None:
        section.missing.append("The images have no classes, so nothing says who is right.")
        return
    _by_class(section, samples, scores, {n: c for n, c in chosen.items() if not n.startswith("part ")})


def _by_class(section: Section, samples: Samples, scores: dict, chosen: dict[str, torch.Tensor]) -> None:
    labels = samples.labels
    classes = max(int(labels.max()) + 1, *(decisions.sure(n, z[:1]).shape[1] for n, z in scores.items()))
    some = {name: chosen[name] for name in ("mean", "dnn", "composed", "tuned", "baseline") if name in chosen}
    section.drawings.append(decisions.confusions(some, samples, classes))
    section.drawings.append(decisions.class_bars(decisions.by_class(some, samples, classes)))
    sure = [name for name in ("dnn", "composed", "tuned", "baseline") if name in scores and scores[name].shape[1] > 1]
    if sure and len(labels) >= decisions.BINS:
        table = [row for name in sure for row in decisions.calibrated(name, scores[name], labels)]
        section.drawings.append(decisions.calibrations(table))
