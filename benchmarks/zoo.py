"""Every CNN of timm: split into K parts, compose, and hold the plan's claim to numbers. Every model of timm: planned.

    python benchmarks/zoo.py --parts 4               # all of zoo/names.txt, into zoo/k4.csv
    python benchmarks/zoo.py --parts 4 --all         # zoo/all_names.txt, planned, into zoo/all_k4.csv
    python benchmarks/zoo.py --parts 8 resnet50      # some, on the terminal alone

In float64 with random weights and statistics, every part seeing the whole image: an exact plan has
|F(x) - Σ F_k(x)| <= 1e-9 |F(x)|, an approximate one has not, and splitting the composed model gives the parts back.
Some very deep random networks lose ten digits, whatever computes them: where ten times |F(x(1 + ε)) - F(x)| / |F(x)|,
"rounding" in the table, is above 1e-9, that is the tolerance.
What is narrower than K is kept whole ("replicated" in the table). Models over --max-params are split on the meta
device, and the shapes of their parts' tensors and outputs are checked. A table that was begun is continued,
and what failed is tried again.

With --all no tensor is made: each model is planned on the meta device, where each different part runs once. What cannot
be split is "refused", with the reason; the times are those of the CPU, of timm's `create_model` and of `plan`.
"""

import argparse
import csv
import sys
import time
import warnings
from pathlib import Path

import timm
import torch
from common import provenance, write_table
from tqdm import tqdm

import timm_dd
from timm_dd import Domain
from timm_dd.errors import headline

FOLDER = Path(__file__).parent / "zoo"
FIELDS = ["model", "parts", "verdict", "replicated", "params", "part_params", "error", "rounding", "seconds", "reason"]
PLANNED = ["model", "parts", "verdict", "params", "part_params", "create_s", "plan_s", "reason"]
EPSILON = torch.finfo(torch.float64).eps


def outputs(value) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for v in (value.values() if isinstance(value, dict) else value) for t in outputs(v)]


def shake(parts, seed: int = 0) -> None:
    """Random weights and statistics, so that no zero and no unit variance hides a mistake."""
    generator = torch.Generator().manual_seed(seed)

    def noise(t):
        return torch.randn(t.shape, generator=generator, dtype=t.dtype)

    with torch.no_grad():
        for part in parts:
            for p in part.parameters():
                p += (0.2 if (p == p.flatten()[0]).all() else 0.1 * p) * noise(p)
            for name, b in part.named_buffers():
                if name.endswith("running_var"):
                    b.copy_(1 + 0.3 * noise(b).abs())
                elif name.endswith("running_mean"):
                    b.copy_(0.1 * noise(b))


@torch.no_grad()
def take_statistics(parts, x: torch.Tensor) -> None:
    """BatchNorm's statistics from images; with random ones the outputs of some deep networks do not depend on the image
    at all, nor then on what is approximate."""
    for part in parts:
        for m in part.modules():
            if isinstance(m, torch.nn.modules.batchnorm._BatchNorm):
                m.momentum = 1.0
        part.train()(x)
        part.eval()


def planned(name: str, parts: int) -> dict:
    start = time.process_time()
    with torch.device("meta"):
        timm.create_model(name)
    row, begun = {"create_s": f"{time.process_time() - start:.2f}"}, time.process_time()
    try:
        plan = timm_dd.plan(name, parts, domain=Domain.full(parts))
        row |= {"params": plan.params(), "part_params": plan.params(0)}
        row["reason"] = "; ".join(sorted({reason for *_, reason in plan.approximations}))
        row["verdict"] = "exact" if plan.exact else "approximate"
    except timm_dd.SplitError as e:
        row |= {"verdict": "refused", "reason": headline(e).replace(f"{Path(timm.__file__).parents[1]}/", "")}
    return {**row, "plan_s": f"{time.process_time() - begun:.2f}"}


def check(name: str, parts: int, max_params: float) -> dict:
    plan = timm_dd.plan(name, parts, domain=Domain.full(parts))
    row = {"params": plan.params(), "part_params": plan.params(0), "replicated": "yes" if plan.narrow else ""}
    row["reason"] = "; ".join(sorted({reason for *_, reason in plan.approximations}))
    if plan.params() > max_params:
        shapes(name, plan)
        return {**row, "verdict": "exact, shapes alone" if plan.exact else "approximate, shapes alone"}
    error, rounding = compare(name, plan)
    if error <= 1e-9 and not plan.exact:
        error, rounding = compare(name, plan, statistics=True)
    claim = error <= max(1e-9, 10 * rounding)
    assert claim == plan.exact, f"the plan says {'exact' if plan.exact else 'approximate'}, the error is {error:.1e}"
    verdict = "exact" if plan.exact else "approximate"
    return {**row, "verdict": verdict, "error": f"{error:.1e}", "rounding": f"{rounding:.1e}"}


def compare(name: str, plan, statistics: bool = False) -> tuple[float, float]:
    """The error of the sum of the parts, and that of the composed model against itself when its image moves by the last
    digit; the round trip gives every cut tensor back bit for bit."""
    torch.manual_seed(0)
    full = Domain.full(plan.parts)
    parts = timm_dd.split(name, plan.parts, domain=full).double().eval()
    shake(parts)
    if statistics:
        take_statistics(parts, torch.randn(2, *plan.input_size, dtype=torch.float64))
    x = torch.randn(1, *plan.input_size, dtype=torch.float64)
    merged = timm_dd.merge(parts).double().eval()
    with torch.no_grad():
        whole, nudged, *own = (outputs(y) for y in (merged(x), merged(x * (1 + EPSILON)), *(part(x) for part in parts)))
    assert all(t.isfinite().all() for t in whole), "the composed model's outputs are not finite"
    again = timm_dd.split(merged, plan.parts, domain=full, example_input=x)
    for part, back in zip((p.state_dict() for p in parts), (p.state_dict() for p in again)):
        for key, t in part.items():
            if t.shape != plan.tensors[key].shape:
                assert torch.equal(t, back[key]), f"the round trip changed {key}"
    return distance(whole, [sum(terms) for terms in zip(*own)]), distance(whole, nudged)


def distance(whole: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    return max(float((w - o).norm() / w.norm()) for w, o in zip(whole, other))


def shapes(name: str, plan) -> None:
    """Split without weights in memory: the shapes of the parts' tensors, and of what they give."""
    with torch.device("meta"):
        model = timm.create_model(name)
        x = torch.empty(1, *plan.input_size)
    whole = outputs(model.eval()(x))
    full = Domain.full(plan.parts)
    for k, part in enumerate(timm_dd.split(model, plan.parts, domain=full, example_input=x)):
        for key, t in part.state_dict().items():
            assert tuple(t.shape) == plan.tensors[key].part_shape(k, plan.parts), f"{key} of part {k}: {tuple(t.shape)}"
        given = [t.shape for t in outputs(part(x))]
        assert given == [t.shape for t in whole], f"part {k} gives {given}"


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("names", nargs="*")
    p.add_argument("--parts", type=int, default=4)
    p.add_argument("--max-params", type=float, default=200e6)
    p.add_argument("--all", action="store_true", help="every model of timm, planned alone")
    args = p.parse_args()
    warnings.filterwarnings("ignore")
    kind, fields = ("all_", PLANNED) if args.all else ("", FIELDS)
    origin, table, done = provenance(), FOLDER / f"{kind}k{args.parts}.csv", {}
    if not args.names and table.exists():
        done = {row["model"]: row for row in csv.DictReader(table.open()) if row["verdict"] != "FAILED"}
    names = args.names or (FOLDER / f"{kind}names.txt").read_text().split()
    rows = [done[n] for n in names if n in done]
    for name in tqdm([n for n in names if n not in done], disable=None):
        start = time.time()
        try:
            row = planned(name, args.parts) if args.all else check(name, args.parts, args.max_params)
        except Exception as e:  # a model that fails is a row of the table
            row = {"verdict": "FAILED", "reason": f"{type(e).__name__}: {headline(e)}"}
        rows.append({"model": name, "parts": args.parts, **row, **origin})
        if not args.all:
            rows[-1]["seconds"] = f"{time.time() - start:.1f}"
        tqdm.write(" ".join(f"{rows[-1].get(f, '')}" for f in fields))
        if not args.names:
            write_table(table, sorted(rows, key=lambda r: r["model"]), [*fields, *origin])
    verdicts = [r["verdict"] for r in rows]
    print(f"K={args.parts}:", ", ".join(f"{verdicts.count(v)} {v}" for v in sorted(set(verdicts))))
    return int("FAILED" in verdicts)


if __name__ == "__main__":
    sys.exit(main())
