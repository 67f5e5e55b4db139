"""Who is right: decisions of the parts and of what decides for them, by image, by class, and how sure they are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ..algebra.view import View
from ..two_level.aggregate import GIVE_PROBABILITIES, fit_scale, probabilities
from . import draw
from .draw import BAD, GOOD, INK, SERIES, Drawing, Panel
from .networks import Samples, picture

BINS = 10
TITLES = {"tuned": "fine-tuned", "dnn": "dense net"}
LIKE = {"tuned": "composed", "composed": "joint", "dnn": "two_level", "mean": "parts", "vote": "transfer"}
MANY = 20  # classes from which on a matrix has no numbers of classes
Scores = Mapping[str, torch.Tensor]


def sure(name: str, scores: torch.Tensor) -> torch.Tensor:
    """The probabilities of a network's scores, (N, C); of one score for two classes, (N, 2)."""
    p = scores if name in GIVE_PROBABILITIES else probabilities(scores)
    return torch.cat([1 - p, p], 1) if p.shape[1] == 1 else p


def decided(scores: Scores) -> dict[str, torch.Tensor]:
    """The class that each network decides for, (N,)."""
    return {name: sure(name, z).argmax(1) for name, z in scores.items()}


# ---- by image


def rows(scores: Scores, labels: torch.Tensor | None, i: int) -> list[dict[str, Any]]:
    """What each network says of image i: network, its class, the class's probability, and whether that is right."""
    found = []
    for name, z in scores.items():
        p = sure(name, z[i : i + 1])[0]
        c = int(p.argmax())
        right = None if labels is None else c == int(labels[i])
        found.append({"network": name, "class": c, "probability": float(p[c]), "right": right})
    return found


def on_image(
    table: Sequence[Mapping[str, Any]], samples: Samples, i: int, views: Mapping[str, View], number: int
) -> Drawing:
    """An image, then what each part sees of it, then what decides for them, right in green and wrong in red."""
    x = samples.images[i : i + 1]
    truth = "image" if samples.labels is None else samples.name(int(samples.labels[i]))
    found = [Panel(f"{truth}\n", samples.picture(i))]
    for row in table:
        view = views.get(row["network"])
        seen = samples.picture(i) if view is None else picture(view.crop(x)[0], samples.mean, samples.std)
        found.append(Panel(f"{_title(row['network'])}\n{_verdict(row, samples)}", seen, _colour(row["right"])))
    caption = f"What the networks say of an image of {truth}: their class and its probability, ✓ right, ✗ wrong."
    said = "; ".join(f"{row['network']}: {_verdict(row, samples)}" for row in table)
    return Drawing(f"decisions-{number}", caption, f"{caption} {said}.", table, draw.panels(found))


def _title(name: str) -> str:
    return TITLES.get(name, name)


def _verdict(row: Mapping[str, Any], samples: Samples) -> str:
    mark = {True: "✓ ", False: "✗ ", None: ""}[row["right"]]
    name = samples.name(row["class"])
    return f"{mark}{name if len(name) < 12 else name[:11] + '…'} {100 * row['probability']:.0f} %"


def _colour(right: bool | None) -> str:
    return {True: GOOD, False: BAD, None: INK}[right]


# ---- by class


def confusion(scores: torch.Tensor, labels: torch.Tensor, classes: int) -> np.ndarray:
    """How many images of class i (row) a network takes for class j (column)."""
    counts = torch.zeros(classes, classes, dtype=torch.long)
    counts.index_put_((labels, scores), torch.ones_like(labels), accumulate=True)
    return counts.numpy()


def confusions(chosen: Scores, samples: Samples, classes: int) -> Drawing:
    """Confusion matrices of some networks' decisions."""
    assert samples.labels is not None
    table = [{"network": n, "counts": confusion(c, samples.labels, classes)} for n, c in chosen.items()]
    rows = -(-len(table) // 2)
    fig = draw.figure(2.45 * rows)
    places = draw.axes(fig, rows, 2).flat
    for place in places:
        place.axis("off")
    for place, row in zip(fig.axes, table):
        right = 100 * np.trace(row["counts"]) / max(row["counts"].sum(), 1)
        share = row["counts"] / np.maximum(row["counts"].sum(1, keepdims=True), 1)
        place.axis("on")
        place.grid(False)
        place.imshow(share, vmin=0, vmax=1, cmap="cividis", interpolation="none")
        ticks = range(classes) if classes <= MANY else ()
        place.set(xticks=ticks, yticks=ticks)
        place.set_title(f"{_title(row['network'])}: {right:.1f} %", fontsize=9)
        place.tick_params(labelsize=7, length=0)
    said = [f"{i} {samples.name(i)}" for i in range(classes) if samples.name(i) != str(i)]
    names = f" Classes: {', '.join(said)}." if said and classes <= MANY else ""
    caption = f"Confusion: row i, column j is the share of the images of class i that are taken for class j.{names}"
    worst = "; ".join(f"{row['network']}: {_worst(row['counts'])}" for row in table)
    return Drawing("confusion", caption, f"{caption} Most often confused: {worst}.", table, fig)


def _worst(counts: np.ndarray) -> str:
    wrong = counts - np.diag(np.diag(counts))
    i, j = np.unravel_index(wrong.argmax(), wrong.shape)
    return f"class {i} for class {j}, {wrong[i, j]} times" if wrong.any() else "nothing"


def by_class(chosen: Scores, samples: Samples, classes: int) -> list[dict[str, Any]]:
    """The accuracy of each network on each class, in %: network, class, name, images, top1; of classes with images."""
    found = []
    assert samples.labels is not None
    for name, c in chosen.items():
        for i in range(classes):
            of = samples.labels == i
            if int(of.sum()):
                at = {"network": name, "class": i, "name": samples.name(i), "images": int(of.sum())}
                found.append({**at, "top1": 100 * float((c[of] == i).double().mean())})
    return found


def class_bars(table: Sequence[Mapping[str, Any]]) -> Drawing:
    """The accuracies of the classes, as points on a line for each class."""
    classes = list(dict.fromkeys(row["class"] for row in table))[:40]
    names = {row["class"]: row["name"] for row in table}
    fig = draw.figure(1.0 + 0.24 * len(classes))
    ((ax,),) = draw.axes(fig)
    marks = dict(zip(dict.fromkeys(row["network"] for row in table), "osD^vPX"))
    for network, mark in marks.items():
        of = {row["class"]: row["top1"] for row in table if row["network"] == network}
        at, colour = range(len(classes)), colour_of(network)
        values = [of[c] for c in classes]
        ax.plot(values, at, mark, color=colour, markersize=5, label=_title(network), clip_on=False, alpha=0.9)
    ax.set_yticks(range(len(classes)), [names[c][:16] for c in classes], fontsize=8)
    ax.invert_yaxis()
    ax.set(xlabel="top-1 accuracy, %", xlim=(0, 100))
    draw.legend(fig)
    caption = f"Accuracy of each class{', of the first 40' if len(classes) == 40 else ''}."
    last = [row for row in table if row["network"] == list(marks)[-1]]
    said = "; ".join(f"{row['name']} {row['top1']:.0f} %" for row in last[:20])
    return Drawing("classes", caption, f"{caption} {list(marks)[-1]}: {said}.", table, fig)


def colour_of(network: str) -> str:
    """Of a network's line; the composed one's is lighter than the fine-tuned one's."""
    return SERIES[LIKE.get(network, network)]


# ---- how often parts agree


def agreement(chosen: Scores) -> np.ndarray:
    """The share of the images for which networks i and j decide for the same class."""
    return np.array([[float((a == b).double().mean()) for b in chosen.values()] for a in chosen.values()])


def agreements(chosen: Scores) -> Drawing:
    """How often networks decide alike."""
    shares, names = agreement(chosen), [n.removeprefix("part ") for n in chosen]
    every = [(a, b) for a in chosen for b in chosen]
    table = [{"network": a, "other": b, "share": share} for (a, b), share in zip(every, shares.flat)]
    fig = draw.figure(4.2)
    ((ax,),) = draw.axes(fig)
    ax.grid(False)
    tint = np.empty((*shares.shape, 4))
    tint[..., :3], tint[..., 3] = (0x2F / 255, 0x7D / 255, 0xE0 / 255), 0.5 * shares  # words are readable on it
    ax.imshow(tint, interpolation="none")
    ax.set_xticks(range(len(names)), names, rotation=60 if len(names) > 6 else 0, fontsize=8)
    ax.set_yticks(range(len(names)), names, fontsize=8)
    for i, j in np.ndindex(*shares.shape) if len(names) <= 12 else ():
        ax.text(j, i, f"{100 * shares[i, j]:.0f}", ha="center", va="center", fontsize=7)
    pairs = [shares[i, j] for i in range(len(names)) for j in range(i)]
    mean = f"{100 * sum(pairs) / len(pairs):.0f} %" if pairs else "all"
    caption = f"On how many images, in %, two networks agree; on the mean {mean}. Numbers are parts."
    return Drawing("agreement", caption, caption, table, fig)


# ---- how sure they are


def temperature(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """By which logits are divided for the smallest cross entropy (Guo et al. 2017)."""
    return min(max(1 / fit_scale(logits.double(), labels), math.exp(-3)), math.exp(3))


def calibration(p: torch.Tensor, labels: torch.Tensor) -> list[dict[str, Any]]:
    """Of the probabilities (N, C) in bins of the largest one: images, the mean of it, and the accuracy; of bins with
    images."""
    confidence, c = p.max(1)
    at = (confidence * BINS).long().clamp(max=BINS - 1)
    found = []
    for b in range(BINS):
        of = at == b
        if int(of.sum()):
            right, mean = (labels[of] == c[of]).double().mean(), confidence[of].double().mean()
            found.append({"bin": b, "images": int(of.sum()), "confidence": float(mean), "accuracy": float(right)})
    return found


def calibration_error(table: Sequence[Mapping[str, Any]]) -> float:
    """The expected calibration error: the mean over images of |accuracy - confidence| of their bin."""
    images = sum(row["images"] for row in table)
    return sum(row["images"] * abs(row["accuracy"] - row["confidence"]) for row in table) / max(images, 1)


def calibrated(name: str, logits: torch.Tensor, labels: torch.Tensor) -> list[dict[str, Any]]:
    """`calibration` before and after a temperature: it is found on every other image and tried on the others."""
    t = temperature(logits[::2], labels[::2])
    z, y = logits[1::2], labels[1::2]
    after = {"before": z, "after": z / t}
    return [
        {"network": name, "when": when, "temperature": t if when == "after" else 1.0, **row}
        for when, scaled in after.items()
        for row in calibration(scaled.softmax(1), y)
    ]


def calibrations(table: Sequence[Mapping[str, Any]]) -> Drawing:
    """Accuracy over the probability that networks give their classes, before and after the temperature."""
    networks = list(dict.fromkeys(row["network"] for row in table))
    fig = draw.figure(2.75, draw.WIDTH)
    said, hover = [], {}
    for place, when in zip(draw.axes(fig, 1, 2, sharey=True).flat, ("before", "after")):
        place.plot([0, 1], [0, 1], color=INK, linewidth=0.8, linestyle=":")
        for i, network in enumerate(networks):
            of = [row for row in table if (row["network"], row["when"]) == (network, when)]
            points = [row["confidence"] for row in of], [row["accuracy"] for row in of]
            at, label = f"{when}{i}", _title(network) if when == "before" else None
            place.plot(*points, "o-", color=colour_of(network), markersize=3.5, gid=at, label=label)
            hover[at] = [
                f"{network}: {r['images']} images, {r['accuracy']:.0%} right at {r['confidence']:.0%}" for r in of
            ]
            error, t = calibration_error(of), of[0]["temperature"]
            said.append(f"{_title(network)} {when}: {100 * error:.1f} %" + (f" at {t:.2f}" if when == "after" else ""))
        place.set(xlabel="probability", xlim=(0, 1), ylim=(0, 1))
        place.set_title(f"{when} the temperature", fontsize=9)
    fig.axes[0].set_ylabel("share that is right")
    draw.legend(fig)
    caption = "How sure networks are and how often they are right; on the dotted line both are equal."
    words = f"{caption} Expected calibration error: {'; '.join(said)}."
    return Drawing("calibration", words, words, table, fig, hover)
