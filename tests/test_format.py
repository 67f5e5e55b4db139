"""Folders that the first format's first version wrote. Every later version merges them, and into these very bytes.

The oracle reads them by docs/format.md, with no code of ours.
"""

import hashlib
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash
from safetensors import safe_open
from safetensors.torch import load_file

import timm_dd
from timm_dd import Parts

FROZEN = Path(__file__).parent / "format-1"
COMPOSED = {  # SHA-256 of names and bytes of all tensors
    "resnet": "b3dedd96730aa8e4d565d76de2380b77f3b2256133b90f88e690ad32073e8cf2",
    "windows": "1d434730a2c379b86e29c56398ecf84ccf597fc22eecbaf2fc3e6f3e296f2cf7",
}


def digest(state):
    found = hashlib.sha256()
    for name in sorted(state):
        found.update(name.encode() + state[name].reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def run(atom, k, parts):
    """(size, indices) of what part k has of an atom."""
    if isinstance(atom, int):
        return atom, range(atom)
    if "width" in atom:
        n = atom["width"]
        sizes = [n // parts + (i < n % parts) for i in range(parts)]
        return n, range(sum(sizes[:k]), sum(sizes[: k + 1]))
    return atom["window"], range(atom["start"][k], atom["start"][k] + atom["extent"][k])


def indices(axis, size, k, parts):
    if axis is None:
        return list(range(size))
    found, offset = [], 0
    for term in axis:
        sizes, runs = zip(*(run(atom, k, parts) for atom in term))
        for place in itertools.product(*runs):
            found.append(offset + int(np.ravel_multi_index(place, sizes)))
        offset += int(np.prod(sizes))
    return found


def merged(folder):
    plan = json.loads((folder / "plan.json").read_text())
    parts = plan["parts"]
    states = [load_file(folder / f"part-{k:05d}-of-{parts:05d}.safetensors") for k in range(parts)]
    state = {}
    for name, t in plan["tensors"].items():
        blocks = [s[name] for s in states]
        if not blocks[0].is_floating_point():
            state[name] = torch.stack(blocks).amax(0)
        elif t["reduce"] == "place":
            state[name] = torch.zeros(t["shape"], dtype=blocks[0].dtype)
            for k, block in enumerate(blocks):
                at = np.ix_(*(indices(a, n, k, parts) for a, n in zip(t["axes"], t["shape"])))
                state[name][at] = block
        else:
            total = sum(b.double() for b in blocks)
            state[name] = (total / (parts if t["reduce"] == "mean" else 1)).to(blocks[0].dtype)
    return state


@pytest.mark.parametrize("name", COMPOSED)
def test_a_folder_of_the_first_format(name, tmp_path):
    timm_dd.merge_files(FROZEN / name, tmp_path)
    stored, expected = load_file(tmp_path / "model.safetensors"), merged(FROZEN / name)
    assert stored.keys() == expected.keys()
    assert all(torch.equal(stored[k], v) for k, v in expected.items())
    assert digest(stored) == COMPOSED[name]


def test_its_parts_are_loaded():
    parts = Parts.load(FROZEN / "resnet")
    assert (len(parts), parts.seed, parts.epoch) == (4, 1, 2)
    assert digest(timm_dd.merge(parts).state_dict()) == COMPOSED["resnet"]


def test_the_checksum_is_that_of_the_page():
    path = FROZEN / "resnet" / "part-00001-of-00004.safetensors"
    with safe_open(path, "pt") as f:
        metadata = f.metadata()
    whole = path.read_bytes()
    assert xxhash.xxh3_128(whole.replace(metadata["xxh3_128"].encode(), b"0" * 32)).hexdigest() == metadata["xxh3_128"]
    assert metadata["plan"] == hashlib.sha256((FROZEN / "resnet" / "plan.json").read_bytes()).hexdigest()
    text = (FROZEN.parent.parent / "docs" / "format.md").read_text()
    assert all(f"`{key}`" in text for key in metadata.keys() - {"format"})
    assert all(f"`{key}`" in text for key in json.loads((FROZEN / "resnet" / "plan.json").read_text()))
