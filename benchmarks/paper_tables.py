"""The papers' tables of parameters and FLOPs, with our figures beside them.

    python benchmarks/paper_tables.py     # prints them, and writes paper_tables.csv

A row is the global network and one part: the paper's figures, ours from `timm_dd.profile`, and a recount, with the
network and the way of counting that the paper seems to have used. The bar: parameters within 1 %, or equal in the
paper's digits; the ratio global/part of the FLOPs, ours those of (2.10), within 5 %. A row outside of it is explained
if it has a reason and its recount is inside. Layers (Table 2.1) are equal or not. Exit status 1 if a row is neither.
"""

import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import timm
import torch
from common import provenance, write_table
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import nn

import timm_dd
from timm_dd import Domain
from timm_dd.paper_networks import PadShortcut
from timm_dd.planning.costs import Cost
from timm_dd.reports.profile import profile
from timm_dd.text import table

CSV = Path(__file__).with_suffix(".csv")
BARS = {"parameters": 0.01, "FLOPs": 0.05}
GIGA, MEGA = 1e9, 1e6
HUNDRED_MEGA = 1e8  # klawonn2023's profiler, model-profiler 1.1.8: 'MFLOPs': 1 / 10**8
SIZES = {  # the columns on the terminal
    **{"network": "layer", "what": "what"},
    **{"global": "global", "our_global": "ours", "part": "part", "our_part": "ours"},
}
FIGURES = {
    **{"network": "network", "what": "what", "domain": "boxes", "unit": "unit"},
    **{"global": "global", "our_global": "ours", "global_percent": "%", "global_recount": "recount"},
    **{"part": "part", "our_part": "ours", "part_percent": "%", "part_recount": "recount"},
    **{"ratio": "ratio", "our_ratio": "ours", "ratio_percent": "%"},
}

# ---- the papers' figures, as printed. Table 2.1 of gu2022: layers, then global and part of output and of kernel

TABLE_2_1 = [
    ("input", "224×224×3", "112×112×3"),
    ("1", "224×224×64", "112×112×16", "3×3×3×64", "3×3×3×16"),
    ("2", "224×224×64", "112×112×16", "3×3×64×64", "3×3×16×16"),
    ("3", "112×112×128", "56×56×32", "3×3×64×128", "3×3×16×32"),
    ("4", "112×112×128", "56×56×32", "3×3×128×128", "3×3×32×32"),
    ("5", "56×56×256", "28×28×64", "3×3×128×256", "3×3×32×64"),
    ("6-7", "56×56×256", "28×28×64", "3×3×256×256", "3×3×64×64"),
    ("8", "28×28×512", "14×14×128", "3×3×256×512", "3×3×64×128"),
    ("9-10", "28×28×512", "14×14×128", "3×3×512×512", "3×3×128×128"),
    ("11-13", "14×14×512", "7×7×128", "3×3×512×512", "3×3×128×128"),
    ("14", "1×1×4096", "1×1×1024", "7×7×512×4096", "3×3×128×1024"),
    ("15", "1×1×4096", "1×1×1024", "1×1×4096×4096", "1×1×1024×1024"),
    ("16", "1×1×1000", "1×1×1000", "1×1×4096×1000", "1×1×1024×1000"),
]
# Global and part: parameters in millions, then GFLOPs
TABLE_2_2 = [
    ("VGG16", ("138.35", "4.17"), ("31.65", "0.52")),
    ("ResNet50", ("25.56", "1.99"), ("7.10", "0.13")),
    ("ResNet101", ("44.55", "3.19"), ("14.62", "0.25")),
]
# The same, and the GFLOPs of parts without overlap
TABLE_3_1 = [
    (32, ("7.44", "0.47"), ("2.24", "0.056"), "0.037"),
    (56, ("13.65", "0.86"), ("4.08", "0.103"), "0.067"),
    (110, ("27.62", "1.74"), ("8.23", "0.207"), "0.135"),
]
# Global, and one of 4, of 8 and of 16 parts: parameters in millions, GFLOPs
TABLE_3_4 = [
    (50, ("25.79", "1.66", "0.43", "0.12"), ("7.79", "0.23", "0.028", "0.0056")),
    (101, ("44.86", "2.87", "0.74", "0.20"), ("15.26", "0.42", "0.050", "0.0096")),
]
# The same, MFLOPs
GU2021 = ("17.22", "1.08", "0.27", "0.07"), ("5015.56", "154.57", "19.69", "4.05")
# Global and local: parameters in millions, "MFLOPs"
KLAWONN = {
    ("CIFAR-10", "VGG3"): (("0.5506", "0.0892"), ("0.7779", "0.0497")),
    ("CIFAR-10", "VGG9"): (("4.7868", "1.1959"), ("1.3404", "0.0851")),
    ("CIFAR-10", "ResNet20"): (("0.2718", "0.0691"), ("0.8110", "0.0513")),
    ("TF-Flowers", "VGG3"): (("8.2178", "0.2732"), ("24.6064", "0.6987")),
    ("TF-Flowers", "VGG9"): (("6.3593", "1.3266"), ("41.6092", "1.0736")),
    ("TF-Flowers", "ResNet20"): (("0.2715", "0.0689"), ("25.6608", "0.7206")),
    ("Yale", "VGG3"): (("8.5499", "0.1972"), ("24.1328", "0.3733")),
    ("chest CT", "VGG"): (("1.3529", "0.3396"), ("11.9684", "0.8069")),
}

# ---- why they differ

CUT = "the paper cuts off digits"
BIASES = "Keras' convolutions have biases, timm's have none"
DRAWN = "TensorFlow's profiler also counts how each weight is drawn (2)"
FIVE = (
    "2 MACs + 1 per output + 5 per weight are the paper's FLOPs, to its digits or about 1 %: "
    f"{DRAWN}, likely its L2 penalty (3) and biases"
)
TWO = (
    "2 MACs + 2 per output + 2 per weight are the paper's FLOPs, to its digits or about 1 %: "
    f"{DRAWN}, likely biases and BatchNorm"
)
SLIM = (
    "TF-slim's ResNet strides in a stage's last block, timm's in the first of the next: its global FLOPs are the "
    "paper's, at 224 pixels, not at the 214 of the text, and its part's likely those of sizes rounded down, (2.8)"
)
FIRST = "Keras' ResNet strides in a block's first convolution, timm's in the second"
EIGHT = "the boxes of 96×96 are inferred: of 88 to 112 pixels only 95 and 96 give the 19.69 MFLOPs of gu2021"
EIGHTEEN = (
    "the network is inferred, as the paper has no more than its 18 layers: basic blocks 2-3-3-3, shortcuts without "
    "weights and convolutions with biases give all of the figures, to their digits or 1e-3 (timm's resnet18 has "
    "11.18 M parameters)"
)
HUNDRED = "the profiler that the paper names counts 2 MACs and takes 10^8 FLOPs for an MFLOP"
BUILT = (
    "the paper's local network, with one fully connected layer of 64 and no fifth pooling, is no split of its global "
    "one, so ours is built like that"
)
CLASSES = "the paper's global network has {} classes, its local one {}"
DEPTH = (
    "the profiler that the paper names takes the third axis for the channels, and the global network is unpadded: "
    "what the local figure is of was not found, so the ratio says little"
)

# ---- the boxes

QUADRANTS = Domain.grid(2, 2)
FOOD = {
    4: Domain.grid(2, 2, overlap=28),
    8: Domain.centered8(overlap=8, margin=24),
    16: Domain.grid(4, 4, overlap=26, margin=24),
}
FLOWERS = {**FOOD, 4: Domain.grid(2, 2, overlap=52, margin=24)}
DATA = {  # grid and arguments
    "CIFAR-10": (QUADRANTS, {}),
    "TF-Flowers": (Domain.grid(3, 3), dict(img_size=180, num_classes=5)),
    "Yale": (Domain.grid(4, 4), dict(img_size=(192, 168), in_chans=1, num_classes=38)),
    "chest CT": (Domain.grid(2, 2, 1), {}),
}
GLOBAL_CLASSES = {"TF-Flowers": 6, "Yale": 45}  # what the paper's parameters of VGG3 are of

# ---- networks that timm does not have


def blank(make: Callable[..., nn.Module], *args, **kwargs) -> nn.Module:
    with torch.device("meta"):
        return make(*args, **kwargs)


def resnet_2333(num_classes: int) -> ResNet:
    """Basic blocks 2-3-3-3 with shortcuts without weights."""
    model = ResNet(BasicBlock, (2, 3, 3, 3), num_classes=num_classes)
    for stage, more in ((model.layer2, 64), (model.layer3, 128), (model.layer4, 256)):
        stage[0].downsample = PadShortcut(more, 2)
    return model


def strides_first(model: ResNet) -> ResNet:
    """Bottlenecks stride in their first convolution."""
    for block in model.modules():
        if isinstance(block, Bottleneck):
            block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride
    return model


def strides_last(model: ResNet) -> ResNet:
    """The last bottleneck of a stage strides, not the first of the next; sizes are rounded down."""
    stages = [model.layer1, model.layer2, model.layer3, model.layer4]
    for stage in stages[1:]:
        stage[0].conv2.stride = stage[0].downsample[0].stride = 1
    for stage in stages[:-1]:
        block = stage[-1]
        block.conv2.stride, block.conv2.padding = 2, 0
        block.conv2 = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), block.conv2)
        block.downsample = nn.MaxPool2d(2)
    return model


# ---- what is counted

Pair = tuple[Cost, Cost]
Count = Callable[[Cost], float]


def costs(model: str | nn.Module, parts: int, domain: Domain, **kwargs) -> Pair:
    """Of the global network and the part; a module takes 224×224 pixels."""
    if isinstance(model, nn.Module):
        kwargs["example_input"] = torch.empty(1, 3, 224, 224, device="meta")
    found = profile(model, parts, domain=domain, **kwargs)
    assert not found.whole.uncounted + found.part.uncounted
    return found.whole, found.part


def whole(model: str, **kwargs) -> Cost:
    return costs(model, 1, Domain.full(1), **kwargs)[0]


def trained(cost: Cost) -> int:
    return cost.parameters


def with_statistics(cost: Cost) -> int:
    """As Keras counts."""
    return cost.parameters + cost.statistics


def with_biases(cost: Cost) -> int:
    """As Keras counts if each convolution has a bias; each has a BatchNorm, so they are as many as the means."""
    return with_statistics(cost) + cost.statistics // 2


def flops(cost: Cost) -> int:
    return cost.flops


def per_weight_and_output(weight: int, output: int) -> Count:
    """2 MACs, and so much for each weight and each output of the convolutions and fully connected layers."""

    def count(cost: Cost) -> int:
        weights = cost.parameters - cost.statistics  # BatchNorm has as many parameters as statistics
        return 2 * cost.multiply_adds + weight * weights + output * (2 * cost.multiply_adds - cost.flops)

    return count


FIVE_AND_ONE, TWO_AND_TWO = per_weight_and_output(5, 1), per_weight_and_output(2, 2)


def two_macs(cost: Cost) -> int:
    return 2 * cost.multiply_adds


def depth_as_channels(height: int, width: int, depth: int) -> int:
    """What model-profiler makes of four unpadded 3×3×3 convolutions, each with a 2×2×2 pooling, and of fully connected
    layers of 512 and 1 on 256 channels."""
    count = 2 * (256 * 512 + 512)
    for _ in range(4):
        count += 2 * 9 * depth * (depth - 2) * (height - 2) * (width - 2)
        height, width, depth = ((n - 2) // 2 for n in (height, width, depth))
    return count


# ---- rows


class Where(NamedTuple):
    table: str
    network: str
    ours: str
    domain: Domain
    divisor: int  # of the widths


def row(
    where: Where, what: str, unit: float, paper: tuple[str, str], ours: tuple, recount: tuple, *whys: str
) -> dict[str, object]:
    """`paper`, `ours` and `recount` are (global, part), None where the recount does not know."""
    ours, recount = ([n and n / unit for n in pair] for pair in (ours, recount))
    within = agrees(what, ours, paper)
    verdict = "within" if within else "explained" if any(whys) and agrees(what, recount, paper) else "OUTSIDE"
    ratio, our_ratio = float(paper[0]) / float(paper[1]), ours[0] / ours[1]
    return {
        **head(where, what),
        "unit": f"{unit:.0e}".replace("+0", ""),
        **columns("global", paper[0], ours[0], recount[0]),
        **columns("part", paper[1], ours[1], recount[1]),
        "ratio": f"{ratio:.2f}",
        "our_ratio": f"{our_ratio:.2f}",
        "ratio_percent": percent(our_ratio, ratio),
        "verdict": verdict,
        "why": "; ".join(filter(None, whys)),
    }


def head(where: Where, what: str) -> dict[str, object]:
    named = where._asdict()
    return {**named, "domain": str(where.domain), "parts": where.domain.parts, "what": what}


def columns(name: str, paper: str, ours: float, recount: float | None) -> dict[str, str]:
    return {
        name: paper,
        f"our_{name}": f"{ours:.{decimals(paper) + 1}f}",
        f"{name}_percent": percent(ours, float(paper)),
        f"{name}_recount": "" if recount is None else f"{recount:.{decimals(paper) + 1}f}",
    }


def decimals(figure: str) -> int:
    return len(figure.partition(".")[2])


def percent(ours: float, paper: float) -> str:
    return f"{round(100 * (ours / paper - 1), 2) + 0.0:+.2f}"  # no -0.00


def agrees(what: str, ours: list[float | None], paper: tuple[str, str]) -> bool:
    """Whether (global, part) keep to the bar, see the top."""
    if None in ours:
        return False
    equal = [f"{n:.{decimals(p)}f}" == p for n, p in zip(ours, paper)]
    factors = [n / float(p) for n, p in zip(ours, paper)]
    if what == "parameters":
        return all(same or abs(f - 1) <= BARS[what] for same, f in zip(equal, factors))
    return all(equal) or abs(factors[0] / factors[1] - 1) <= BARS[what]


def each(pair: Pair, count: Count) -> tuple[float, float]:
    return count(pair[0]), count(pair[1])


# ---- tables


def layers_of_vgg16() -> Iterator[dict]:
    """Table 2.1 of gu2022."""
    x = torch.empty(1, 3, 224, 224, device="meta")
    model = blank(timm.create_model, "vgg16").eval()
    parts = timm_dd.split(model, 4, domain=QUADRANTS, example_input=x)
    ours = list(zip(layers(model, x), layers(parts[0], parts.crops(x)[0])))
    for name, *figures in TABLE_2_1:
        first, _, to = name.removeprefix("input").partition("-")
        found = ours[int(first or 0) : int(to or first or 0) + 1]
        where = Where("Table 2.1 of gu2022", f"VGG16, {name}", "vgg16", QUADRANTS, 4)
        for i, what in enumerate(("output size", "kernel size") if first else ("output size",)):
            paper = tuple(figures[2 * i : 2 * i + 2])
            pairs = [(whole[i], part[i]) for whole, part in found]
            shown = dict(zip(("global", "part"), paper)) | dict(zip(("our_global", "our_part"), pairs[0]))
            verdict = "within" if all(pair == paper for pair in pairs) else "OUTSIDE"
            yield {**head(where, what), **shown, "verdict": verdict, "why": ""}


def layers(model: nn.Module, x: torch.Tensor) -> list[tuple[str, str]]:
    """Sizes of output and kernel of the input and of each layer with weights."""
    found, hooks = [(channels_last(x), "")], []

    def note(layer: nn.Module, _, out: torch.Tensor) -> None:
        found.append((channels_last(out), channels_last(layer.weight)))

    for layer in model.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            hooks.append(layer.register_forward_hook(note))
    model(x)
    for hook in hooks:
        hook.remove()
    return found


def channels_last(t: torch.Tensor) -> str:
    """Of an output (1, C, H, W) or (1, C), or of weights (out, in, h, w) or (out, in)."""
    out, channels, *size = (*t.shape, 1, 1)[:4]
    return "×".join(map(str, (*size, channels) if out == 1 else (*size, channels, out)))


def known_networks() -> Iterator[dict]:
    """Table 2.2 of gu2022."""
    for network, parameters, giga in TABLE_2_2:
        name, vgg = network.lower(), network == "VGG16"
        where = Where("Table 2.2 of gu2022", network, name, QUADRANTS, 4)
        ours = costs(name, 4, QUADRANTS, img_size=224)
        like = ours if vgg else costs(strides_last(blank(timm.create_model, name)), 4, QUADRANTS)
        count = each(ours, trained)
        yield row(where, "parameters", MEGA, parameters, count, count, CUT if vgg else "")
        yield row(where, "FLOPs", GIGA, giga, each(ours, flops), each(like, FIVE_AND_ONE), "" if vgg else SLIM, FIVE)


def cifar_networks() -> Iterator[dict]:
    """Table 3.1 of gu2022."""
    for depth, parameters, giga, apart in TABLE_3_1:
        name, overlapping = f"dd_resnet{depth}", Domain.grid(2, 2, overlap=4)
        where = Where("Table 3.1 of gu2022", f"ResNet{depth}", name, overlapping, 4)
        ours = costs(name, 4, overlapping)
        yield row(where, "parameters", MEGA, parameters, each(ours, with_statistics), each(ours, with_biases), BIASES)
        yield row(where, "FLOPs", GIGA, giga, each(ours, flops), each(ours, FIVE_AND_ONE), FIVE)
        where, ours = where._replace(domain=QUADRANTS), costs(name, 4, QUADRANTS)
        yield row(where, "FLOPs", GIGA, (giga[0], apart), each(ours, flops), each(ours, FIVE_AND_ONE), FIVE)


def food_networks() -> Iterator[dict]:
    """Table 3.4 of gu2022."""
    for depth, (parameters, *part_parameters), (giga, *part_giga) in TABLE_3_4:
        name = f"dd_resnet{depth}_fc1024"
        for (parts, domain), own, own_giga in zip(FOOD.items(), part_parameters, part_giga):
            where = Where("Table 3.4 of gu2022", f"ResNet{depth}, SNet-{parts}", name, domain, parts)
            ours = costs(name, parts, domain)
            like = costs(strides_first(blank(timm.create_model, name)), parts, domain)
            count, recount = each(ours, with_statistics), each(ours, with_biases)
            yield row(where, "parameters", MEGA, (parameters, own), count, recount, BIASES)
            count, recount = each(ours, flops), each(like, TWO_AND_TWO)
            yield row(where, "FLOPs", GIGA, (giga, own_giga), count, recount, FIRST, TWO, EIGHT if parts == 8 else "")


def flower_network() -> Iterator[dict]:
    """Table 1 of gu2021."""
    (parameters, *part_parameters), (mega, *part_mega) = GU2021
    for (parts, domain), own, own_mega in zip(FLOWERS.items(), part_parameters, part_mega):
        where = Where("Table 1 of gu2021", f"18 layers, SNet-{parts}", "resnet_2333", domain, parts)
        ours = costs(blank(resnet_2333, num_classes=5), parts, domain)
        count, recount = each(ours, with_statistics), each(ours, with_biases)
        yield row(where, "parameters", MEGA, (parameters, own), count, recount, EIGHTEEN)
        count, recount = each(ours, flops), each(ours, TWO_AND_TWO)
        yield row(where, "FLOPs", MEGA, (mega, own_mega), count, recount, EIGHTEEN, TWO, EIGHT if parts == 8 else "")


def local_networks() -> Iterator[dict]:
    """Table 2 of klawonn2023. Local networks have half the widths, whatever the number of boxes."""
    named = {"VGG3": "dd_vgg3", "VGG9": "dd_vgg9", "ResNet20": "dd_resnet20_16", "VGG": "dd_vgg3d"}
    for (data, network), (parameters, figures) in KLAWONN.items():
        domain, kwargs = DATA[data]
        where = Where("Table 2 of klawonn2023", f"{network}, {data}", named[network], domain, 2)
        if network == "VGG9":
            ours = global_and_local_vgg9(domain, **kwargs)
        else:
            ours = costs(named[network], domain.parts, domain, width_divisor=2, **kwargs)
        count = recount = each(ours, with_statistics)
        why = BUILT if network == "VGG9" else ""
        if network == "VGG3" and data in GLOBAL_CLASSES:
            classes = GLOBAL_CLASSES[data]
            why = CLASSES.format(classes, kwargs["num_classes"])
            recount = with_statistics(whole(named[network], **{**kwargs, "num_classes": classes})), count[1]
        yield row(where, "parameters", MEGA, parameters, count, recount, why)
        recount, why = each(ours, two_macs), HUNDRED
        if data == "chest CT":
            recount, why = (depth_as_channels(128, 128, 64), None), DEPTH
        yield row(where, "FLOPs", HUNDRED_MEGA, figures, each(ours, flops), recount, why)


def global_and_local_vgg9(domain: Domain, img_size: int = 32, **kwargs) -> Pair:
    box = domain.boxes((img_size, img_size))[0].extent
    local = dict(widths=(16, 32, 64, 128, 256), hidden=(64,), last_pool=False, img_size=box)
    return whole("dd_vgg9", img_size=img_size, **kwargs), whole("dd_vgg9", **local, **kwargs)


TABLES = (layers_of_vgg16, known_networks, cifar_networks, food_networks, flower_network, local_networks)

# ---- output


def text(rows: list[dict]) -> str:
    """The rows of one table, and the reasons below."""
    whys = list(dict.fromkeys(why for r in rows for why in r["why"].split("; ") if why))
    names = FIGURES if "unit" in rows[0] else SIZES
    lines = [(*names.values(), "verdict", "why")]
    for r in rows:
        letters = " ".join(chr(ord("a") + whys.index(why)) for why in r["why"].split("; ") if why)
        lines.append((*(str(r[name]) for name in names), r["verdict"], letters))
    notes = [textwrap.fill(f"{chr(ord('a') + i)}  {why}", 118, subsequent_indent="   ") for i, why in enumerate(whys)]
    return "\n".join([rows[0]["table"], "", table(lines), *notes, ""])


def main() -> int:
    rows = []
    for make in TABLES:
        rows += (own := list(make()))
        print(text(own))
    origin = provenance()
    write_table(CSV, ({**r, **origin} for r in rows), [*max(rows, key=len), *origin])
    verdicts = Counter(r["verdict"] for r in rows)
    print(f"{len(rows)} rows:", ", ".join(f"{n} {verdict}" for verdict, n in verdicts.items()))
    return int("OUTSIDE" in verdicts)


if __name__ == "__main__":
    sys.exit(main())
