"""Mutated parts, plans and two-level networks, by the thousand: merging is refused in one line and leaves nothing, or
gives a whole model; a two-level network is refused, or loaded and decides.

    python tests/fuzz.py --inputs 20000

A mutation changes bytes of a file, or what its JSON says, and then as a liar would: the digests are made to fit. A few
files are exchanged, removed, or something else than files. Of a fifth of the inputs the parts are whole, and the model
that they are merged onto is mutated.
"""

import argparse
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import struct
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from tqdm import tqdm

import timm_dd
from timm_dd import Domain, MergeError, Parts, TwoLevel
from timm_dd.storage.files import part_name
from timm_dd.storage.tensorfile import UNSEALED, xxhash
from timm_dd.two_level import files as two_level

PARTS = 2
DEEP = "@deep@"  # stands for lists in lists in lists
LIMIT = 10  # seconds for one input
VALUES = (None, True, -1, 0, 1, 2, 3, 2**31, 2**63, 10**18, 0.5, 1e308, float("nan"), "", "x", "../../x", "hf-hub:a/b",
          "local-dir:/tmp", "\x00", "place", "mean", [], [[]], {}, {"width": 4}, [1] * 9,
          {"window": 4, "start": [0], "extent": [9]}, {"kind": "TypeB", "p": 10**9, "axes": 10**9},
          {"kind": "Full", "parts": 10**18})  # fmt: skip


class TooLong(BaseException):
    pass


def make(folder: Path) -> list[Path]:
    """Folders of parts to begin with: a timm model on scaled views, one with replicated widths, a fully connected one
    with windows. A folder beside them has the merged models."""
    scaled = Domain.full(PARTS, scale=0.5)
    timm_dd.split("dd_resnet20_16", PARTS, seed=0, num_classes=3, domain=scaled).half().save(folder / "a")
    timm_dd.split("tinynet_e", PARTS, seed=0, num_classes=3, img_size=32).save(folder / "b")
    flat = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(4 * 36, 5))
    domain = Domain.grid(1, 2, overlap=2)
    timm_dd.split(flat, PARTS, example_input=torch.empty(1, 3, 8, 8), domain=domain).save(folder / "c")
    for name in "abc":
        timm_dd.merge_files(folder / name, folder / "onto" / name)
    return [folder / name for name in "abc"]


def make_two_level(folder: Path) -> list[Path]:
    """Two-level networks to begin with: with a dense network, and one that names the parts of another."""
    parts = timm_dd.split("test_resnet", PARTS, seed=0, num_classes=3, img_size=32)
    two = TwoLevel(parts, "dnn", widths=(6, 4), class_names="abc")
    two.save(folder / "dnn")
    vote = TwoLevel(parts, "vote").description()
    two_level.save(folder / "vote", parts, vote, None, linked=folder / "dnn")
    return [folder / "dnn", folder / "vote"]


# ---- bytes


def flip(data: bytearray, r: random.Random) -> None:
    for _ in range(r.choice((1, 1, 1, 8, 64))):
        data[r.randrange(len(data))] ^= 1 << r.randrange(8)


def flip_in_the_header(data: bytearray, r: random.Random) -> None:
    for _ in range(r.choice((1, 2, 4))):
        data[r.randrange(min(len(data), 2000))] = r.randrange(256)


def cut(data: bytearray, r: random.Random) -> None:
    del data[r.randrange(len(data)) :]


def grow(data: bytearray, r: random.Random) -> None:
    data += r.randbytes(r.choice((1, 8, 1000)))


def overwrite(data: bytearray, r: random.Random) -> None:
    at, n = r.randrange(len(data)), r.choice((4, 64, 5000))
    data[at : at + n] = r.choice((bytes, r.randbytes))(n)


def move(data: bytearray, r: random.Random) -> None:
    a, b, n = r.randrange(len(data)), r.randrange(len(data)), r.choice((4, 64, 5000))
    data[a : a + n] = data[b : b + n]


BYTES = (flip, flip_in_the_header, cut, grow, overwrite, move)

# ---- JSON


def places(value, path=()):
    """The paths to everything in a JSON value."""
    yield path
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(inner, (*path, key))


def lie(value, r: random.Random):
    """`value` with one to three things in it changed, removed, repeated or put elsewhere."""
    for _ in range(r.choice((1, 1, 2, 3))):
        found = [p for p in places(value) if p]
        if not found:
            break
        *path, last = r.choice(found)
        inside = value
        for step in path:
            inside = inside[step]
        how = r.randrange(8)
        if how == 0:
            del inside[last]
        elif how == 1 and isinstance(inside, list):
            inside.insert(last, inside[last])
        elif how == 2:
            other = value
            for step in r.choice(found):
                other = other[step]
            inside[last] = json.loads(json.dumps(other))
        elif how == 3 and type(inside[last]) is int:
            inside[last] += r.choice((-1, 1, 1000))
        elif how == 4 and isinstance(inside, dict):
            inside["x" + str(last)] = inside.pop(last)
        elif how == 5:
            inside[last] = DEEP
        else:
            inside[last] = r.choice(VALUES)
    return value


def dump(value, r: random.Random) -> str:
    n = r.choice((90, 900, 990, 100_000))
    return json.dumps(value).replace(f'"{DEEP}"', "[" * n + "]" * n)


def header(path: Path) -> tuple[dict, bytes]:
    data = path.read_bytes()
    (n,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + n]), data[8 + n :]


def seal(path: Path, head: dict, data: bytes, r: random.Random) -> None:
    """Write a part with a checksum that fits."""
    if isinstance(head.get("__metadata__"), dict):
        head["__metadata__"]["xxh3_128"] = UNSEALED
    text = dump(head, r).encode()
    whole = struct.pack("<Q", len(text)) + text + data
    digest = xxhash.xxh3_128(whole).hexdigest().encode()
    path.write_bytes(whole.replace(UNSEALED.encode(), digest, 1))


def lie_in_a_plan(folder: Path, r: random.Random) -> None:
    plan = lie(json.loads((folder / "plan.json").read_text()), r)
    (folder / "plan.json").write_text(dump(plan, r))
    for k in range(PARTS):
        head, data = header(folder / part_name(k, PARTS))
        head["__metadata__"]["plan"] = hashlib.sha256((folder / "plan.json").read_bytes()).hexdigest()
        if isinstance(plan, dict):
            head["__metadata__"]["model"] = str(plan.get("model") or "")
        seal(folder / part_name(k, PARTS), head, data, r)


def lie_in_a_part(folder: Path, r: random.Random) -> None:
    path = folder / part_name(r.randrange(PARTS), PARTS)
    head, data = header(path)
    seal(path, lie(head, r), data, r)


def lie_in_a_two_level_json(folder: Path, r: random.Random) -> None:
    path = folder / two_level.TWO_LEVEL
    path.write_text(dump(lie(json.loads(path.read_text()), r), r))


def lie_in_a_coarse_net(folder: Path, r: random.Random) -> None:
    """With a checksum that fits, in two_level.json too."""
    path, about = folder / two_level.COARSE, folder / two_level.TWO_LEVEL
    head, data = header(path)
    seal(path, lie(head, r), data, r)
    try:
        sealed = header(path)[0]["__metadata__"]["xxh3_128"]
        said = json.loads(about.read_text())
        said["checksums"][two_level.COARSE] = sealed
        about.write_text(json.dumps(said))
    except (ValueError, KeyError, TypeError, RecursionError):  # the lie left no place for one
        pass


# ---- files


def exchange(path: Path, r: random.Random) -> None:
    other = r.choice(sorted(p for p in path.parent.iterdir() if p != path))
    shutil.copyfile(other, path)


def remove(path: Path, r: random.Random) -> None:
    path.unlink()


def folder_instead(path: Path, r: random.Random) -> None:
    path.unlink()
    path.mkdir()


def link_instead(path: Path, r: random.Random) -> None:
    path.unlink()
    path.symlink_to(r.choice(("/dev/null", "/etc/passwd", "nowhere", path.name)))


def pipe_instead(path: Path, r: random.Random) -> None:
    path.unlink()
    os.mkfifo(path)


FILES = (exchange, remove, folder_instead, link_instead, pipe_instead)


def mutate_onto(path: Path, r: random.Random) -> str:
    """Change something in a model; what."""
    kind = r.random()
    if kind < 0.5:
        head, data = header(path)
        seal(path, lie(head, r), data, r)
        return "onto: lie"
    how = r.choice(BYTES if kind < 0.9 else FILES[1:])
    if how in BYTES:
        mutate_bytes(path, how, r)
    else:
        how(path, r)
    return f"onto: {how.__name__.replace('_', ' ')}"


def mutate_bytes(path: Path, how, r: random.Random) -> None:
    data = bytearray(path.read_bytes())
    how(data, r)
    path.write_bytes(data)


def mutate(folder: Path, r: random.Random) -> str:
    """Change something in a folder of parts; what."""
    kind = r.random()
    if kind < 0.35:
        lie_in_a_plan(folder, r)
        return "lie in a plan"
    if kind < 0.6:
        lie_in_a_part(folder, r)
        return "lie in a part"
    path = r.choice(sorted(folder.iterdir()))
    if kind < 0.95:
        how = r.choice(BYTES)
        mutate_bytes(path, how, r)
    else:
        how = r.choice(FILES)
        how(path, r)
    return how.__name__.replace("_", " ")


def mutate_two_level(folder: Path, r: random.Random) -> str:
    """Change something in a two-level network; what."""
    kind = r.random()
    if kind < 0.5:
        lie_in_a_two_level_json(folder, r)
        return "two levels: lie"
    if kind < 0.7 and (folder / two_level.COARSE).exists():
        lie_in_a_coarse_net(folder, r)
        return "two levels: lie in weights"
    path, how = r.choice(sorted(folder.iterdir())), r.choice(BYTES if kind < 0.95 else FILES[1:])
    if how in BYTES:
        mutate_bytes(path, how, r)
    else:
        how(path, r)
    return f"two levels: {how.__name__.replace('_', ' ')}"


# ---- the run


def decide(folder: Path, r: random.Random) -> str:
    """Load a two-level network and let it decide; ``loaded`` or ``refused``."""
    try:
        network = TwoLevel.load(folder, missing=r.choice(("refuse", "refuse", "drop"))).eval()
    except MergeError as e:
        assert "\n" not in str(e) and len(str(e)) < 1000, e
        return "refused"
    with torch.no_grad():
        scores = network(torch.zeros(2, 3, 32, 32))
    assert scores.shape == (2, 3) and scores.isfinite().all()
    return "loaded"


def call(folder: Path, output: Path, onto: Path | None, r: random.Random) -> str:
    """Merge a folder; ``merged`` or ``refused``. Now and then read it into memory too."""
    before = {p.name: p.read_bytes() for p in output.iterdir()} if output.exists() else None
    try:
        timm_dd.merge_files(folder, output, head=r.choice(("sum", "sum", "sum", "mean")), onto=onto)
    except MergeError as e:
        assert "\n" not in str(e) and len(str(e)) < 1000, e
        after = {p.name: p.read_bytes() for p in output.iterdir()} if output.exists() else None
        assert after == before, f"{after} after {e}"
        return "refused"
    names = sorted(p.name for p in output.iterdir())
    assert names in (["model.safetensors"], ["config.json", "model.safetensors"]), names
    load_file(output / "model.safetensors")
    return "merged"


def read(folder: Path) -> None:
    for function in (Parts.load, timm_dd.merge):
        try:
            function(folder)
        except MergeError as e:
            assert "\n" not in str(e) and len(str(e)) < 1000, e


def prepare_parts(folder: Path, source: Path, r: random.Random) -> tuple[str, Callable[[], str]]:
    """A mutated folder of parts, or a mutated model to merge them onto; what was changed, and what to do with it."""
    parts, output = folder / "parts", folder / "output"
    onto = folder / "onto" if r.random() < 0.2 else None
    shutil.copytree(source, parts)
    if r.random() < 0.5:
        output.mkdir()
    if onto is None:
        what = mutate(parts, r)
    else:
        shutil.copytree(source.parent / "onto" / source.name, onto)
        what = mutate_onto(onto / "model.safetensors", r)

    def work() -> str:
        outcome = call(parts, output, onto, r)
        if r.random() < 0.02:
            read(parts)
        return outcome

    return what, work


def prepare_two_level(folder: Path, source: Path, r: random.Random) -> tuple[str, Callable[[], str]]:
    """The same of a two-level network."""
    shutil.copytree(source.parent, folder / "two-level")
    network = folder / "two-level" / source.name
    return mutate_two_level(network, r), partial(decide, network, r)


def fuzz(inputs: int, seed: int, folder: Path, progress: bool = False) -> Counter:
    """Counts of (mutation, outcome). Anything but MergeError, or something left behind, is raised, with its number."""

    def stop(*_):
        raise TooLong(f"longer than {LIMIT} s")

    before = signal.signal(signal.SIGALRM, stop)
    sources, counts = make(folder / "sources"), Counter()
    networks = make_two_level(folder / "sources" / "two-level")
    try:
        for i in tqdm(range(inputs), disable=not progress):
            r = random.Random(f"{seed}-{i}")
            two_levels = r.random() < 0.2
            what, work = (
                prepare_two_level(folder, r.choice(networks), r)
                if two_levels
                else prepare_parts(folder, r.choice(sources), r)
            )
            signal.alarm(LIMIT)
            try:
                outcome = work()
            except BaseException as e:
                raise AssertionError(f"input {i} of seed {seed}, {what}: {type(e).__name__}: {e}") from e
            finally:
                signal.alarm(0)
                for left in ("parts", "output", "onto", "two-level"):
                    shutil.rmtree(folder / left, ignore_errors=True)
            assert sorted(p.name for p in folder.iterdir()) == ["sources"]
            counts[what, outcome] += 1
    finally:
        signal.signal(signal.SIGALRM, before)
    return counts


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--inputs", type=int, default=20_000)
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args()
    start = time.time()
    with tempfile.TemporaryDirectory() as folder:
        counts = fuzz(args.inputs, args.seed, Path(folder), progress=True)
    for what in sorted({what for what, _ in counts}):
        accepted = sum(n for (which, outcome), n in counts.items() if which == what and outcome != "refused")
        print(f"{what:>32}: {counts[what, 'refused']:6} refused, {accepted:6} merged or loaded")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(f"{counts.total():,} inputs in {time.time() - start:.0f} s, no other exception, nothing left; peak {peak} MB")


if __name__ == "__main__":
    main()
