"""The joint stage: its gradients are the composed network's inside the blocks, on one device and over ranks; a run with
it, and one that is killed in it."""

import json
import shutil

import pytest
import torch
import torch.distributed as dist
from conftest import MODULE, RUN, TORCHRUN, images, kill_a_rank, shake, torchrun
from safetensors.torch import load_file

import timm_dd
from timm_dd import Domain
from timm_dd.cli import main
from timm_dd.storage.files import part_name
from timm_dd.train.engines import Engine, Packed, Threads
from timm_dd.train.epochs import checkpoints
from timm_dd.train.settings import options
from timm_dd.train.stages.joint import Joint
from timm_dd.train.updates.learner import Learner

CPU = torch.device("cpu")
JOINT = [*RUN, "--parts", "4", "--joint-epochs", "2", "--part-epochs", "1"]


def parts_of_a_network():
    """In float64 and in training mode, so that BatchNorm's statistics are those of the batch."""
    parts = timm_dd.split("resnet10t", 4, domain=Domain.full(4), seed=0, img_size=32, num_classes=10)
    return shake(parts).train()


def learners(parts, folder, which=range(4), *given):
    args = options.parse([*RUN, *given])
    return [Learner(f"part {k}", parts[k], None, args, CPU, 5, 8, k, folder / str(k)) for k in which]


def batch():
    return images(8, 3, 32, 32), torch.arange(8) % 10


def composed_gradients(parts, x, y, chunks=1):
    """Of the merged network, by name."""
    model = timm_dd.merge(parts).double().train()
    criterion = timm_dd.train.updates.learner.criterion(options.parse(RUN))
    for x_i, y_i in zip(x.chunk(chunks), y.chunk(chunks)):
        (criterion(model(x_i), y_i) / chunks).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def check_gradients(plan, k, part, expected):
    for name, p in part.named_parameters():
        torch.testing.assert_close(p.grad, expected[name][plan.tensors[name].block(k, 4)], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize("by", [Engine, lambda: Threads(2), Packed], ids=["sequential", "threads", "packed"])
def test_gradients_are_the_composed_networks_inside_the_blocks(by, chunks, tmp_path):
    """So the weights between the blocks are as good as frozen at zero."""
    parts, (x, y) = parts_of_a_network(), batch()
    expected = composed_gradients(parts, x, y, chunks)
    some = learners(parts, tmp_path, range(4), "--grad-accum-steps", str(chunks))
    with Joint(by()) as joint:
        joint.gradients(some, [x] * len(some), y)
    for k, part in enumerate(parts):
        check_gradients(parts.plan, k, part, expected)


def gradients_of_a_rank(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.set_num_threads(1)
    parts, mine, (x, y) = parts_of_a_network(), range(rank, 4, 2), batch()
    some = learners(parts, folder, mine)
    loss = Joint(Engine(), dist.group.WORLD).gradients(some, [x] * len(some), y)[0]
    found = {k: {name: p.grad for name, p in parts[k].named_parameters()} for k in mine}
    torch.save((loss, found), folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_gradients_over_two_ranks(tmp_path):
    """Each has two of the parts; what they exchange is the sum of their logits."""
    torch.multiprocessing.spawn(gradients_of_a_rank, (tmp_path,), nprocs=2)
    parts, (x, y) = parts_of_a_network(), batch()
    expected = composed_gradients(parts, x, y)
    (loss, even), (other_loss, odd) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert loss == other_loss
    for k, part in enumerate(parts):
        for name, p in part.named_parameters():
            p.grad = {**even, **odd}[k][name]
        check_gradients(parts.plan, k, part, expected)


def test_the_learners_take_their_steps(tmp_path):
    """The loss of the sum falls, and all learners have it."""
    parts, (x, y) = parts_of_a_network(), batch()
    some, joint = learners(parts, tmp_path), Joint(Engine())
    losses = []
    for _ in range(8):
        joint.step(some, x, y, isolate_failures=False)
        losses.append([float(n.sums.loss) for n in some])
    assert all(len(set(row)) == 1 for row in losses)
    steps = [b[0] - a[0] for a, b in zip(losses, losses[1:])]
    assert steps[-1] < 0.7 * losses[0][0] and [n.updates for n in some] == [8] * 4


# ---- runs


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("joint")
    assert main(["train", *JOINT, "--output", str(folder), "--experiment", "run"]) == 0
    return folder / "run"


def test_a_run_with_a_joint_stage(run):
    """The sum of the parts on whole images is the composed model; parts/ keeps what was trained on boxes."""
    summary = json.loads((run / "summary.json").read_text())
    assert summary["joint"] == summary["composed"] and summary["seconds"]["joint"] > 0
    merged = timm_dd.merge(run / "joint").state_dict()
    composed = load_file(run / "composed" / "model.safetensors")
    assert all(torch.equal(t, composed[name]) for name, t in merged.items())
    before, after = (timm_dd.merge(run / stage).state_dict() for stage in ("parts", "joint"))
    assert not torch.equal(before["conv1.0.weight"], after["conv1.0.weight"])
    assert timm_dd.Parts.load(run / "joint").plan.domain == Domain.full(4)
    updates = [json.loads((run / "joint" / str(k) / "summary.json").read_text())["updates"] for k in range(4)]
    assert updates == [8] * 4


def test_a_joint_stage_that_is_done_is_not_trained_again(run, capsys):
    again = ["train", *JOINT, "--output", str(run.parent), "--experiment", "run", "--resume"]
    before = (run / "joint" / "0" / part_name(0, 4)).stat().st_mtime_ns
    (run / "summary.json").unlink()
    assert main(again) == 0
    assert (run / "joint" / "0" / part_name(0, 4)).stat().st_mtime_ns == before
    assert main([*again, "--joint-lr", "0.3"]) == 1
    assert "part 0 is done, with other options" in capsys.readouterr().err


def test_a_joint_stage_is_of_the_parts_that_lie_there(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "run")
    again = ["train", "--resume", str(tmp_path / "run")]
    assert main([*again, "--joint-epochs", "0"]) == 1
    said = (
        f"{tmp_path / 'run' / 'global'} was not trained from the present parts; remove {tmp_path / 'run' / 'global'} "
    )
    assert said in capsys.readouterr().err
    shutil.rmtree(tmp_path / "run" / "parts")
    assert main([*again, "--part-epochs", "2"]) == 1
    joint = tmp_path / "run" / "joint"
    assert f"{joint / '0'} was not trained from the present parts; remove {joint} to" in capsys.readouterr().err


@pytest.mark.slow
def test_two_ranks_give_the_same_bits(run, tmp_path):
    done = torchrun(2, *JOINT, "--output", str(tmp_path), "--experiment", "two")
    assert done.returncode == 0, done.stderr
    assert "joint part 0, joint part 2: loss" in done.stdout
    assert files_of(tmp_path / "two") == files_of(run)


@pytest.mark.slow
def test_a_run_that_was_killed_in_the_joint_stage_ends_with_the_same_bits(run, tmp_path):
    """One of two ranks is killed, first or second, before the joint stage and in it; then one process goes on."""
    arguments = [*JOINT, "--output", str(tmp_path), "--experiment", "run", "--checkpoint-every", "0.05", "--resume"]
    for rank, title in ((0, "parts 1/1"), (1, "joint 1/2")):
        kill_a_rank([*TORCHRUN, "2", *MODULE, *arguments[: None if (tmp_path / "run").exists() else -1]], rank, title)
    assert main(["train", *arguments]) == 0
    assert files_of(tmp_path / "run") == files_of(run)


def files_of(run):
    """The bytes that a run's training gives; of the seconds it does not depend."""
    names = [f"{stage}/{k}/{part_name(k, 4)}" for stage in ("parts", "joint") for k in range(4)]
    return [(run / name).read_bytes() for name in [*names, "composed/model.safetensors"]]


def test_learners_go_on_from_a_state_that_all_have(tmp_path):
    """After four saves, the last at the end of an epoch: one learner has not written it, another's is half a file."""
    parts, (x, y) = parts_of_a_network(), batch()
    some, joint, weights = learners(parts, tmp_path), Joint(Engine()), []
    for n in some:
        n.folder.mkdir()
    for _ in range(3):
        joint.step(some, x, y, isolate_failures=False)
        weights.append([n.net.conv1[0].weight.detach().clone() for n in some])
        for n in some:
            checkpoints.save(n)
    for n in some[1:]:
        n.end_epoch(10.0, 1.0)
        checkpoints.save(n)
    path = checkpoints.found(some[1].folder)[0]
    path.write_bytes(path.read_bytes()[:1000])
    checkpoints.restore_together(some, lambda found: found)
    assert [(n.updates, n.history) for n in some] == [(2, [])] * 4
    assert all(torch.equal(n.net.conv1[0].weight, w) for n, w in zip(some, weights[1]))


def test_parts_with_kernels_for_their_boxes_have_no_joint_stage(tmp_path, capsys):
    given = ["--model", "dd_vgg3", "--parts", "4", "--joint-epochs", "1", "--output", str(tmp_path)]
    assert main(["train", *[a for a in RUN if a not in ("--drop-path", "0.2")], *given]) == 1
    assert "weights for the positions of their boxes" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_no_joint_stage_without_all_parts(tmp_path, capsys):
    given = ["--parts", "2", "--joint-epochs", "1", "--part-lr", "1e30", "0.05", "--output", str(tmp_path)]
    assert main(["train", *RUN, *given, "--experiment", "run"]) == 1
    assert "part 0 failed" in capsys.readouterr().err
    assert not (tmp_path / "run" / "joint").exists() and not (tmp_path / "run" / "composed").exists()


def test_joint_epochs_are_a_number_from_0_up(capsys):
    with pytest.raises(SystemExit, match="2"):
        options.parse([*RUN, "--joint-epochs", "-1"])
    assert "--joint-epochs is a whole number from 0 up" in capsys.readouterr().err
