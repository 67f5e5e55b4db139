"""What a split is worth where LayerNorm makes it approximate: a small ViT, a Swin, a ConvNeXt and a MobileViT on
scikit-learn's digits, beside one of theirs that trains whole for the multiply-adds of all stages; and what is done
about it.

    python benchmarks/attention.py          # into attention.csv

A row is one run of `timm_dd.train` on whole images, K = 4. "parts" is the mean of the parts, "together" that of their
sum of logits, "composed" the merged model untouched, "updated" after what the variant does to it, "first" after an
epoch of fine-tuning, "tuned" after all; "baseline" has so many epochs as "cost" says, rounded. Runs share their parts.
Rows that the table has are not measured again. The variant of the table that is not in the list here, the parts'
statistics folded into the LayerNorms, won nowhere and is gone; the commit in its rows has it.
"""

import argparse
import csv
import tempfile
from pathlib import Path

from common import provenance, write_table
from shared_parts import trained

import timm_dd
from timm_dd import Domain
from timm_dd.train.settings import options

TABLE = Path(__file__).with_suffix(".csv")
OPTIONS = (
    "--dataset digits --grid full --shift 2 --hflip 0 -b 64 -j 0 --opt adamw --lr 0.002 --smoothing 0 "
    "--warmup-epochs 0 --joint-epochs 0 --no-keep-momenta --part-epochs 16 --epochs 4"
)
NETWORKS = {
    "ViT": ("vit_tiny_patch16_224", "patch_size=4 embed_dim=64 depth=4 num_heads=4"),
    "Swin": (
        "swin_tiny_patch4_window7_224",
        "patch_size=2 window_size=4 embed_dim=32 depths=(1,2,2) num_heads=(4,4,8)",
    ),
    "ConvNeXt": ("convnext_atto", "patch_size=2 depths=(1,1,2,1) dims=(16,32,64,128)"),
    "MobileViT": ("mobilevit_xxs", ""),
}
VARIANTS = {"plain": "--baseline", "temperature": "--calibrate temperature"}
FIGURES = ("together", "composed", "updated", "first", "tuned", "baseline")


def given(network: str, variant: str, seed: int, output: str) -> tuple[argparse.Namespace, float]:
    """The run's options, and what all stages cost, in epochs of the global network."""
    model, kwargs = NETWORKS[network]
    words = [*OPTIONS.split(), *VARIANTS[variant].split(), "--model", model, "--seed", str(seed), "--output", output]
    words += ["--model-kwargs", *kwargs.split()] if kwargs else []
    words += ["--experiment", "run", "--resume", f"{output}/run"]
    args = options.parse(words)
    size = {"img_size": 32, "num_classes": 10, **args.model_kwargs}
    found = timm_dd.profile(model, args.parts, domain=Domain.full(args.parts), **size)
    ratio = args.parts * found.part.multiply_adds / found.whole.multiply_adds
    cost = (args.part_epochs + args.joint_epochs) * ratio + args.epochs
    baseline = ["--baseline-epochs", str(round(cost))] if args.baseline else []
    return options.parse([*words, *baseline]), cost


def row(network: str, variant: str, seed: int, kept: Path) -> dict[str, str]:
    with tempfile.TemporaryDirectory() as output:
        args, cost = given(network, variant, seed, output)
        found = trained(args, Path(output) / "run", kept)
    figures = {"parts": sum(found["parts"]) / len(found["parts"]), **{k: found.get(k) for k in FIGURES}}
    said = {k: f"{v:.2f}" if v is not None else "" for k, v in figures.items()}
    return {"network": network, "variant": variant, "seed": str(seed), **said, "cost": f"{cost:.2f}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=list(NETWORKS), metavar="NETWORK")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS, metavar="NAME")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--kept", type=Path, default=Path(tempfile.gettempdir()) / "attention", metavar="DIR")
    args, origin = parser.parse_args(), provenance()
    jobs = [(n, v, s) for s in args.seeds for v in args.variants for n in args.networks]
    for job in jobs:
        table = list(csv.DictReader(TABLE.open())) if TABLE.exists() else []
        if any((r["network"], r["variant"], r["seed"]) == (*job[:2], str(job[2])) for r in table):
            continue
        table.append({**row(*job, args.kept), **origin})
        print("  ".join(f"{k} {v}" for k, v in table[-1].items()), flush=True)
        write_table(TABLE, table, list(table[-1]))


if __name__ == "__main__":
    main()
