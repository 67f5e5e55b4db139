"""What a split is worth where LayerNorm makes it approximate: a small ViT, a Swin, a ConvNeXt and a MobileViT on
scikit-learn's digits, beside one of theirs that trains whole for the multiply-adds of all stages.

    python benchmarks/attention.py          # into attention.csv

A row is one run of `timm_dd.train` on whole images, K = 4. "parts" is the mean of the parts, "together" that of their
sum of logits, "composed" the merged model untouched, "first" after an epoch of fine-tuning, "tuned" after all;
"baseline" has so many epochs as "cost" says, rounded. Rows that the table has are not measured again.
"""

import argparse
import csv
import tempfile
from pathlib import Path

from common import provenance, write_table

import timm_dd
from timm_dd import Domain
from timm_dd.train.run import train
from timm_dd.train.settings import options

TABLE = Path(__file__).with_suffix(".csv")
OPTIONS = (
    "--dataset digits --grid full --shift 2 --hflip 0 -b 64 -j 0 --opt adamw --lr 0.002 --smoothing 0 "
    "--warmup-epochs 0 --joint-epochs 0 --no-keep-momenta --part-epochs 16 --epochs 4 --baseline"
)
NETWORKS = {
    "ViT": ("vit_tiny_patch16_224", "patch_size=4 embed_dim=64 depth=4 num_heads=4"),
    "Swin": (
        "swin_tiny_patch4_window7_224",
        "patch_size=2 window_size=4 embed_dim=32 depths=(1,2,2) num_heads=(4,4,8)",
    ),
    "ConvNeXt": ("convnext_atto", "patch_size=2 depths=(1,1,2,1) dims=(16,32,64,128)"),
    "MobileViT": ("mobilevit_xxs", ""),
    "ResNet": ("resnet10t", ""),  # which is exact
}
VARIANTS = {"plain": "", "joint 4": "--joint-epochs 4"}
FIGURES = ("together", "joint", "composed", "updated", "first", "tuned", "baseline")


def given(network: str, variant: str, seed: int, output: str) -> tuple[argparse.Namespace, float]:
    """The run's options, and what all stages cost, in epochs of the global network."""
    model, kwargs = NETWORKS[network]
    words = [*OPTIONS.split(), *VARIANTS[variant].split(), "--model", model, "--seed", str(seed), "--output", output]
    words += ["--model-kwargs", *kwargs.split()] if kwargs else []
    args = options.parse([*words, "--experiment", "run"])
    size = {"img_size": 32, "num_classes": 10, **args.model_kwargs}
    found = timm_dd.profile(model, args.parts, domain=Domain.full(args.parts), **size)
    ratio = args.parts * found.part.multiply_adds / found.whole.multiply_adds
    cost = (args.part_epochs + args.joint_epochs) * ratio + args.epochs
    return options.parse([*words, "--experiment", "run", "--baseline-epochs", str(round(cost))]), cost


def row(network: str, variant: str, seed: int) -> dict[str, str]:
    with tempfile.TemporaryDirectory() as output:
        args, cost = given(network, variant, seed, output)
        found = train(args)
        with max(Path(output).rglob("global/summary.csv"), key=lambda p: p.stat().st_mtime).open() as f:
            found["first"] = float(next(csv.DictReader(f))["eval_top1"])
    figures = {"parts": sum(found["parts"]) / len(found["parts"]), **{k: found.get(k) for k in FIGURES}}
    said = {k: f"{v:.2f}" if v is not None else "" for k, v in figures.items()}
    return {"network": network, "variant": variant, "seed": str(seed), **said, "cost": f"{cost:.2f}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=list(NETWORKS), metavar="NETWORK")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS, metavar="NAME")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args, origin = parser.parse_args(), provenance()
    jobs = [(n, v, s) for s in args.seeds for v in args.variants for n in args.networks]
    for job in jobs:
        table = list(csv.DictReader(TABLE.open())) if TABLE.exists() else []
        if any((r["network"], r["variant"], r["seed"]) == (*job[:2], str(job[2])) for r in table):
            continue
        table.append({**row(*job), **origin})
        print("  ".join(f"{k} {v}" for k, v in table[-1].items()), flush=True)
        write_table(TABLE, table, list(table[-1]))


if __name__ == "__main__":
    main()
