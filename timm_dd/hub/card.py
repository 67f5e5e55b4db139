"""Model cards: what a repository on the Hub says of itself, rendered from the templates in ``hub_cards/``.

Everything in a card is read from what is pushed: the metadata of ``model.safetensors``, ``config.json``, and the
``summary.json`` of the training run that made the model. The metadata name that run; it is looked for in all folders
above the model's. A model that no run made, or that lies elsewhere, has a card without results.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import timm
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..errors import MergeError, TimmDDError, headline, shown
from ..reports import boxes, curves
from ..reports.draw import Drawing
from ..reports.record import read
from ..storage import files
from ..storage.tensorfile import READ_ERRORS, TensorFile
from ..two_level import files as two_level
from ..two_level.aggregate import TOGETHER

TEMPLATES = Path(__file__).parent / "templates"  # links to hub_cards/
TAGS = ["timm_dd", "domain-decomposition"]
STAGES = ("composed", "tuned", "best")  # the models of a run: what its summary calls them, and their metadata
PICTURES = ("accuracy-over-seconds.png", "boxes.png")
TWO_LEVEL = ("two_level", *TOGETHER)


class Card(NamedTuple):
    text: str
    images: Mapping[str, bytes]  # PNG, by the names that the text gives them


def of_model(repo: str, folder: Path) -> Card:
    """The card of a composed model.

    Raises:
        MergeError: there is none in `folder`, or none of ours, or timm could not load it from the Hub.
    """
    about, config = _metadata(folder / files.MODEL), _config(folder / "config.json")
    run = _run(folder, about)
    architecture = config["architecture"]
    data = ModelCardData(
        library_name="timm",
        pipeline_tag="image-classification",
        tags=["image-classification", "timm", *TAGS],
        metrics=["accuracy"] if run else None,
        **(
            {"model_name": repo.split("/")[-1], "eval_results": [_result(run, run["results"][about["stage"]])]}
            if run
            else {}
        ),
    )
    ours = timm.is_model(architecture) and timm.model_entrypoint(architecture).__module__.startswith("timm_dd")
    stage = about.get("stage")
    given = {"about": about, "config": config, "stage": stage}
    return _card(data, "composed.md.jinja", run, repo=repo, ours=ours, **given)


def of_parts(repo: str, parts: files.PartsFolder) -> Card:
    """The card of a folder of parts."""
    data = ModelCardData(library_name="timm_dd", tags=["image-classification", *TAGS])
    plan = parts.plan
    about = {**files.summary(plan, parts.digest), "seed": parts.history()[0], "epoch": parts.history()[1]}
    counts = plan.params(), plan.params(0)
    return _card(data, "parts.md.jinja", None, repo=repo, about=about, plan=plan, counts=counts)


def of_two_level(repo: str, folder: Path) -> Card:
    """The card of a two-level network."""
    about, place = two_level.describe(folder)
    with files.PartsFolder(place.parts) as parts:
        plan, made = parts.plan, {**files.summary(parts.plan, parts.digest), **place.origin}
    run = _run(folder, made, TWO_LEVEL) if "top1" in made else None
    given = {"metrics": ["accuracy"], "model_name": repo.split("/")[-1]} if run else {}
    if run:
        given["eval_results"] = [_result(run, float(made["top1"]))]
    data = ModelCardData(library_name="timm_dd", pipeline_tag="image-classification", tags=TAGS, **given)
    return _card(data, "two_level.md.jinja", run, repo=repo, about=about, made=made, plan=plan)


def _card(data: ModelCardData, template: str, run: dict | None, **values) -> Card:
    drawings = _drawings(run)
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
    try:
        with TensorFile(path) as file:
            metadata = file.metadata
    except READ_ERRORS as e:
        raise MergeError(f"{path} cannot be read ({headline(e)}); compose the parts again") from e
    if not {"timm_dd", "plan", "parts"} <= metadata.keys():
        raise MergeError(f"{path} was not composed by timm_dd; timm.models.push_to_hf_hub pushes any timm model")
    return metadata


def _config(path: Path) -> dict:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        size, names = config["pretrained_cfg"]["input_size"], config.get("label_names") or []
        for value, kind in ((config["architecture"], str), (size, list), (names, list)):
            if not isinstance(value, kind):
                raise ValueError(f"unexpected {shown(value)}")
        return {"size": size, **config}
    except FileNotFoundError as e:
        raise MergeError(
            f"no config.json in {path.parent}: only what timm can create can be loaded from the Hub"
        ) from e
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise MergeError(f"{path} is damaged ({headline(e)}); compose the parts again") from e


def _run(folder: Path, about: Mapping[str, str], stages: Sequence[str] = STAGES) -> dict | None:
    """The summary of the run that made a model, and its folder; None if there is none above the model's, or the run is
    not done."""
    if "run" not in about or about.get("stage") not in stages:
        return None
    for above in folder.resolve().parents:
        described, summary = above / files.PLAN, above / "summary.json"
        if summary.is_file() and described.is_file() and sha256(described.read_bytes()).hexdigest() == about["plan"]:
            found = _summary(summary)
            if found["run"] == about["run"]:  # not another cycle, or another run, of the same plan
                return {**found, "folder": above}
    return None


def _summary(path: Path) -> dict:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        results = {stage: float(found[stage]) for stage in STAGES}
        for name in ("dataset", "split", "run"):
            if not isinstance(found[name], str):
                raise ValueError(f"unexpected {name} {shown(found[name])}")
        return {**found, "results": results}
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise MergeError(f"{path} is damaged ({type(e).__name__}: {headline(e)}); let the run write it again") from e


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
