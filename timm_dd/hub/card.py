"""Model cards: what a repository on the Hub says of itself, rendered from the templates in ``hub_cards/``.

Everything in a card is read from what is pushed: the metadata of ``model.safetensors``, ``config.json``, and the
``summary.json`` of the training run that made the model. The metadata name that run; it is looked for in all folders
above the model's. A model that no run made, or that lies elsewhere, has a card without results.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import timm
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..errors import MergeError, ReportError, TimmDDError
from ..reports import boxes, curves
from ..reports.draw import Drawing
from ..reports.record import STAGES, read, read_summary
from ..storage import composed, files
from ..storage.tensorfile import TensorFile
from ..text import in_markdown
from ..two_level import files as two_level

TEMPLATES = Path(__file__).parent / "templates"  # links to hub_cards/
TAGS = ["timm_dd", "domain-decomposition"]
PICTURES = ("accuracy-over-seconds.png", "boxes.png")


class Card(NamedTuple):
    text: str
    images: Mapping[str, bytes]  # PNG, by the names that the text gives them


def of_model(repo: str, folder: Path) -> Card:
    """The card of a composed model.

    Raises:
        MergeError: there is none in `folder`, or none of ours, or timm could not load it from the Hub.
    """
    about, config = _metadata(folder / files.MODEL), composed.read_config(folder)
    composed.check_weights(folder, config)
    run = _run(folder, about)
    architecture = config["architecture"]
    data = ModelCardData(
        library_name="timm",
        pipeline_tag="image-classification",
        tags=["image-classification", "timm", *TAGS],
        metrics=["accuracy"] if run else None,
        **({"model_name": repo.split("/")[-1], "eval_results": [_result(run, run[about["stage"]])]} if run else {}),
    )
    ours = timm.is_model(architecture) and timm.model_entrypoint(architecture).__module__.startswith("timm_dd")
    stage = about.get("stage")
    given = {"about": about, "config": config, "stage": stage, "names": config["label_names"]}
    return _card(data, "composed.md.jinja", run, repo=repo, ours=ours, **given)


def of_parts(repo: str, parts: files.PartsFolder) -> Card:
    """The card of a folder of parts."""
    data = ModelCardData(library_name="timm_dd", tags=["image-classification", *TAGS])
    plan = parts.plan
    about, counts = files.summary(plan, parts.digest), (plan.params(), plan.params(0))
    seeds, epochs = map(_different, zip(*map(parts.history, range(plan.parts))))
    given = {"about": about, "plan": plan, "counts": counts, "seeds": seeds, "epochs": epochs}
    return _card(data, "parts.md.jinja", None, repo=repo, **given)


def _different(said: Iterable[int | None]) -> list[str]:
    """What the parts say, once each; nothing if none says anything."""
    found = dict.fromkeys(said)
    return [] if set(found) == {None} else ["an unknown number" if n is None else str(n) for n in found]


def of_two_level(repo: str, folder: Path) -> Card:
    """The card of a two-level network."""
    about, place = two_level.describe(folder)
    with files.PartsFolder(place.parts) as parts:
        plan, made = parts.plan, {**files.summary(parts.plan, parts.digest), **place.origin}
    run = _run(folder, made, two_level.STAGES) if "top1" in made else None
    given = {"metrics": ["accuracy"], "model_name": repo.split("/")[-1]} if run else {}
    if run:
        given["eval_results"] = [_result(run, float(made["top1"]))]
    data = ModelCardData(library_name="timm_dd", pipeline_tag="image-classification", tags=TAGS, **given)
    return _card(data, "two_level.md.jinja", run, repo=repo, about=about, made=made, plan=plan, names=about.class_names)


def _card(data: ModelCardData, template: str, run: dict | None, names: Sequence[str] | None = None, **values) -> Card:
    drawings = _drawings(run)
    values["names"] = [in_markdown(name) for name in names or ()]
    for name in ("dataset", "split") if run is not None else ():
        values[name] = in_markdown(run[name])
    values["citation"] = (TEMPLATES / "citation.bib").read_text(encoding="utf-8")
    values |= {"run": run, "images": {name: drawing.caption for name, drawing in drawings.items()}}
    text = ModelCard.from_template(data, template_path=str(TEMPLATES / template), **values)
    return Card(str(text), {name: drawing.png() for name, drawing in drawings.items()})


def _drawings(run: dict | None) -> dict[str, Drawing]:
    """Curves and boxes of the run that made what is pushed; none where no run did, and none without matplotlib."""
    if run is None or importlib.util.find_spec("matplotlib") is None:
        return {}
    try:
        record = read(run["folder"])
    except TimmDDError:  # another file of the run is damaged, or of an older version; what is pushed is whole
        return {}
    curve, seen = curves.curve(curves.rows(record), "accuracy", "seconds"), boxes.boxes(record.plan)
    return dict(zip(PICTURES, (curve, seen)))


def _metadata(path: Path) -> dict[str, str]:
    if not path.is_file():
        raise MergeError(
            f"{path.parent} has neither {files.MODEL} nor {files.PLAN}; push what timm-dd merge, split or train wrote"
        )
    with files.reading(path, composed.AGAIN), TensorFile(path) as file:
        metadata = file.metadata
    if not {"timm_dd", "plan", "parts"} <= metadata.keys():
        raise MergeError(f"{path} was not composed by timm_dd; timm.models.push_to_hf_hub pushes any timm model")
    return metadata


def _run(folder: Path, about: Mapping[str, str], stages: Sequence[str] = STAGES) -> dict | None:
    """The summary of the run that made a model, and its folder; None if there is none above the model's, or the run is
    not done."""
    if "run" not in about or about.get("stage") not in stages:
        return None
    for above in folder.resolve().parents:
        described, summary = above / files.PLAN, above / "summary.json"
        if summary.is_file() and described.is_file() and sha256(described.read_bytes()).hexdigest() == about["plan"]:
            try:
                found = read_summary(summary)
            except ReportError as e:
                raise MergeError(str(e)) from e
            if found["run"] == about["run"]:  # not another cycle, or another run, of the same plan
                return {**found, "folder": above}
    return None


def _result(run: dict, top1: float) -> EvalResult:
    return EvalResult(
        task_type="image-classification",
        dataset_type=run["dataset"].lower(),
        dataset_name=run["dataset"],
        dataset_split=run["split"],
        metric_type="accuracy",
        metric_name="top-1 accuracy, %",
        metric_value=round(top1, 2),
    )
