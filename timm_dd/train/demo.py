"""The demo: the whole pipeline on scikit-learn's digits, and the composed model back through stock timm."""

from __future__ import annotations

import timm
import torch

from ..errors import MergeError
from .images import data
from .run import Run
from .settings import options


def demo(output: str, seed: int) -> None:
    """Run ``demo.yaml``, then load the fine-tuned model with `timm.create_model` and count again.

    Raises:
        MergeError: the loaded model has another accuracy than the trained one.
    """
    args = options.parse(["-c", "demo.yaml", "--output", output, "--seed", str(seed)], prog="timm-dd demo")
    run = Run(args)
    summary = run.go()
    folder = run.folder.path / "global" / "last"
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).to(run.device).eval()
    _, val = data.loaders(args, run.data_config, run.train_set, run.val_set, run.device, distributed=False)
    with torch.no_grad():
        right = sum(int((model(x).argmax(1) == y).sum()) for x, y in val)
    accuracy = 100 * right / len(run.val_set)
    print(f"timm.create_model('local-dir:{folder}', pretrained=True): {accuracy:.2f} %")
    if accuracy != summary["tuned"]:
        raise MergeError(f"the model in {folder} has {accuracy:.2f} %, the trained one had {summary['tuned']:.2f} %")
