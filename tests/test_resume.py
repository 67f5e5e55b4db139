"""Nothing is lost: runs that are killed, stopped or resumed, parts that fail, checkpoints."""

import contextlib
import json
import math
import os
import random
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from conftest import MODULE, RUN, TORCHRUN, bytes_of_parts, torchrun
from timm.optim import create_optimizer_v2, optimizer_kwargs

from timm_dd.cli import main
from timm_dd.errors import TrainError
from timm_dd.storage import tensorfile
from timm_dd.storage.files import part_name
from timm_dd.train import run
from timm_dd.train.epochs import checkpoints
from timm_dd.train.run import Run
from timm_dd.train.settings import options
from timm_dd.train.stages.folder import PartsStage
from timm_dd.train.updates import optimizers
from timm_dd.train.updates.learner import Learner

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
LONGER = [*RUN, "--parts", "4", "--part-epochs", "3", "--epochs", "3", "--checkpoint-every", "0.05"]
WEIGHTS = ("composed/model.safetensors", "global/last/model.safetensors", "global/best/model.safetensors")


def start(command, *arguments):
    return subprocess.Popen(
        [*command, *LONGER, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        bufsize=1,
        start_new_session=True,
    )


def after_lines(process, n):
    """Wait until a process has printed n lines, or ended."""
    for _ in zip(range(n), process.stdout):
        pass


def workers(process):
    return list(map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()))


def same_files(a, b, *names):
    return [name for name in names if (a / name).read_bytes() != (b / name).read_bytes()] == []


def curve(run):
    """The summary of the composed model, but for the seconds."""
    return [line.split(",")[:-1] for line in (run / "global/summary.csv").read_text().splitlines()]


def same(a, b):
    parts = (f"parts/{k}/{part_name(k, 4)}" for k in range(4))
    return same_files(a, b, *WEIGHTS, *parts) and curve(a) == curve(b)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of two ranks that nobody disturbs."""
    folder = tmp_path_factory.mktemp("whole")
    done = subprocess.run([*TORCHRUN, "2", *MODULE, *LONGER, "--output", folder, "--experiment", "run"], timeout=300)
    assert done.returncode == 0
    return folder / "run"


@pytest.mark.slow
def test_a_run_that_was_killed_five_times_ends_with_the_same_bits(whole, tmp_path):
    """Two ranks, either of them killed at a random line of what the run prints; then it goes on to its end."""
    draw = random.Random(0)
    arguments = ["--output", str(tmp_path), "--experiment", "run", "--resume", "auto"]
    for kill in range(5):
        process = start([*TORCHRUN, "2", *MODULE], *arguments)
        after_lines(process, 3 + kill if kill < 4 else draw.randint(1, 3))
        for pid in workers(process)[draw.randrange(2) :][:1]:
            os.kill(pid, signal.SIGKILL)
        process.communicate(timeout=120)
    last = start([*TORCHRUN, "2", *MODULE], *arguments)
    out, errors = last.communicate(timeout=300)
    assert last.returncode == 0, errors
    assert same(tmp_path / "run", whole)
    assert len(list((tmp_path / "run" / "global").glob("checkpoint-*"))) == 2
    assert [p for p in tmp_path.rglob(".*")] == []


@pytest.mark.slow
@pytest.mark.parametrize("rank, lines", [(0, 4), (1, 3), (1, 9)])
def test_torchrun_starts_a_killed_rank_again(rank, lines, whole, tmp_path):
    """Either of them, while parts train and in a process group; with --max-restarts no --resume is needed."""
    command = [*TORCHRUN, "2", "--max-restarts", "1", *MODULE]
    process = start(command, "--output", str(tmp_path), "--experiment", "run")
    after_lines(process, lines)
    os.kill(workers(process)[rank], signal.SIGKILL)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert same(tmp_path / "run", whole)


@pytest.mark.slow
@pytest.mark.parametrize("request_to_stop, workers", [(signal.SIGTERM, "2"), (signal.SIGINT, "0")])
def test_a_run_that_is_asked_to_stop_saves_and_goes_on(whole, request_to_stop, workers, tmp_path):
    """One process with its workers, as `timeout` and schedulers ask it, in stage 1 and again in stage 2; without
    workers, who augment otherwise, its parts have the bits of those of two ranks."""
    arguments = ["--output", str(tmp_path), "--experiment", "run", "--resume", "-j", workers]
    for lines in (3, 4):
        process = start([sys.executable, *MODULE], *arguments)
        after_lines(process, lines)
        os.killpg(process.pid, request_to_stop)
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 1
        assert errors.splitlines()[-1] == (
            f"timm-dd train: stopped by {request_to_stop.name}; all is saved, the same command with --resume goes on"
        )
    last = start([sys.executable, *MODULE], *arguments)
    assert last.wait(timeout=300) == 0
    if workers == "0":
        assert bytes_of_parts(tmp_path / "run", 4) == bytes_of_parts(whole, 4)


def test_a_run_that_is_asked_to_stop_as_soon_as_it_says_that_it_begins(tmp_path, monkeypatch, capsys):
    title = run._title

    def asked(of):
        os.kill(os.getpid(), signal.SIGINT)
        return title(of)

    monkeypatch.setattr(run, "_title", asked)
    given = ["train", *RUN, "--parts", "4", "--output", str(tmp_path), "--experiment", "run", "--resume"]
    assert main(given) == 1
    assert capsys.readouterr().err.splitlines()[-1] == (
        "timm-dd train: stopped by SIGINT; all is saved, the same command with --resume goes on"
    )
    monkeypatch.setattr(run, "_title", title)
    assert main(given) == 0


def test_a_part_that_fails_does_not_stop_the_others(one, tmp_path, monkeypatch, capsys):
    step = Learner.step

    def fail(self, x, y):
        if self.name == "part 1" and self.updates == 5:
            raise RuntimeError("out of luck")
        step(self, x, y)

    arguments = ["train", *RUN, "--parts", "4", "--output", str(tmp_path), "--experiment", "run", "--resume"]
    monkeypatch.setattr(Learner, "step", fail)
    assert main(arguments) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "part 1 failed (out of luck); 3 of 4 parts are done and kept: --resume" in error
    assert {p.parent.name for p in tmp_path.glob("run/parts/*/summary.json")} == {"0", "2", "3"}
    monkeypatch.setattr(Learner, "step", step)
    before = (tmp_path / "run/parts/0" / part_name(0, 4)).stat().st_mtime_ns
    assert main(arguments) == 0
    assert (tmp_path / "run/parts/0" / part_name(0, 4)).stat().st_mtime_ns == before  # not trained again
    assert bytes_of_parts(tmp_path / "run", 4) == bytes_of_parts(one, 4)


def test_a_part_whose_statistics_overflow_fails(tmp_path, monkeypatch, capsys):
    """Its loss is finite, and so is that of its average; the others are kept, and it is trained again if removed."""
    step = Learner.step

    def overflow(self, x, y):
        step(self, x, y)
        if self.name == "part 1":
            next(t for name, t in self.net.named_buffers() if name.endswith("running_var")).fill_(math.inf)

    given = ["train", *RUN, "--parts", "2", "--part-epochs", "1", "--model-ema", "--output", str(tmp_path)]
    monkeypatch.setattr(Learner, "step", overflow)
    assert main([*given, "--experiment", "run"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert (
        "part 1 failed (part 1: " in error and "running_var is not finite" in error and "1 of 2 parts are done" in error
    )
    assert {p.parent.name for p in tmp_path.glob("run/parts/*/summary.json")} == {"0"}
    monkeypatch.setattr(Learner, "step", step)
    shutil.rmtree(tmp_path / "run" / "parts" / "1")
    assert main(["train", "--resume", str(tmp_path / "run")]) == 0


def test_a_part_that_fails_while_packed(tmp_path, monkeypatch, capsys):
    """The others finish; and it goes on from its checkpoint."""
    note = Learner.note

    def fail(self, *args):
        if self.name == "part 1" and self.updates == 5:
            raise RuntimeError("out of luck")
        note(self, *args)

    arguments = [*RUN, "--parts", "4", "--output", str(tmp_path), "--experiment", "run", "--engine", "packed"]
    monkeypatch.setattr(Learner, "note", fail)
    assert main(["train", *arguments]) == 1
    assert "part 1 failed (out of luck); 3 of 4 parts are done" in capsys.readouterr().err
    monkeypatch.setattr(Learner, "note", note)
    assert main(["train", *arguments, "--resume"]) == 0
    assert "part 1: loss" in capsys.readouterr().out


def test_a_run_that_exists_is_not_begun_again(one, capsys):
    arguments = ["train", *RUN, "--output", str(one.parent), "--experiment", "one"]
    assert main([*arguments, "--parts", "4"]) == 1
    assert "holds a run already; go on with --resume" in capsys.readouterr().err
    assert main([*arguments, "--parts", "2", "--resume"]) == 1
    assert "a run of another model or split" in capsys.readouterr().err


@pytest.mark.slow
def test_what_a_run_was_trained_with_stays(one, tmp_path, capsys):
    """Finished parts and begun stages are not mixed with others of other options, or other numbers of ranks."""
    shutil.copytree(one, tmp_path / "one")
    arguments = ["train", *RUN, "--parts", "4", "--resume", str(tmp_path / "one")]
    assert main([*arguments, "--part-lr", "0.1"]) == 1
    assert "part 0 is done, with other options (for the parts, --lr was 0.05, not 0.1)" in capsys.readouterr().err
    assert main([*arguments, "--smoothing", "0.3"]) == 1
    assert "--smoothing was 0.1, not 0.3" in capsys.readouterr().err
    done = torchrun(2, *arguments[1:])
    assert done.returncode == 1 and "does not fit (--images was 64, not 128" in done.stderr
    assert main(arguments) == 0 and same_files(one, tmp_path / "one", "global/last/model.safetensors")


@pytest.mark.parametrize(
    "given",
    ["--part-lr 0.1", "--baseline-epochs 2", "--part-epochs 3", "--train-num-samples 320", "-b 32", "--joint-epochs 1"],
)
def test_a_run_that_is_not_gone_on_with_stays_as_it_is(given, one, tmp_path, capsys):
    """Whatever has other options, parts or the whole: nothing is written before it is refused."""
    shutil.copytree(one, tmp_path / "one")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    resume = ["--baseline", "--resume", str(tmp_path / "one")]
    assert main(["train", *RUN, "--parts", "4", *resume, *given.split()]) == 1
    error = capsys.readouterr().err
    assert any(
        said in error for said in ("other options", "does not fit", "was not trained from the present joint parts")
    )
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_a_network_is_of_the_parts_that_lie_there(one, tmp_path, capsys):
    """Once parts are trained with other options, what was fine-tuned before is refused, and trained if removed."""
    run = tmp_path / "one"
    shutil.copytree(one, run)
    for part in (run / "parts").glob("?"):
        shutil.rmtree(part)
    before = {name: (run / name).read_bytes() for name in WEIGHTS}
    given = ["train", "--resume", str(run), "--part-shift", "1"]
    for _ in range(2):
        assert main(given) == 1
        line = f"{run / 'global'} was not trained from the present parts; remove {run / 'global'} to train it again"
        assert line in capsys.readouterr().err
        assert before == {name: (run / name).read_bytes() for name in WEIGHTS}
    assert checkpoints.start(run / "global") == checkpoints.start(one / "global") != {}
    shutil.rmtree(run / "global")
    assert main(given) == 0
    assert not any((run / name).read_bytes() == old for name, old in before.items())
    assert checkpoints.start(run / "global") != checkpoints.start(one / "global")


def test_a_checkpoint_of_an_earlier_version_does_not_say_from_what_it_started(tmp_path, monkeypatch):
    state, older = Learner.state, learner(tmp_path)
    checkpoints.save(older)
    assert checkpoints.start(tmp_path) == {}
    monkeypatch.setattr(Learner, "state", lambda self: (s := state(self), s[1].pop("start"))[0])
    checkpoints.save(older)
    assert checkpoints.start(tmp_path) is None and checkpoints.restore(learner(tmp_path))


def test_a_run_goes_on_when_nobody_reads_what_it_prints(tmp_path):
    """`timm-dd train … 2>&1 | head -1`: to its end, with nobody to tell."""
    given = [*RUN, "--parts", "2", "--part-epochs", "1", "--output", str(tmp_path), "--experiment", "run"]
    command = shlex.join([sys.executable, "-W", "default", *MODULE, *given])
    script = f"set -o pipefail; {command} 2>&1 | head -1"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout.count("\n"), done.stderr) == (0, 1, "")
    assert (tmp_path / "run" / "summary.json").exists()


def test_one_process_trains_in_a_folder(one, tmp_path, capsys, monkeypatch):
    """Another is told who does, and changes nothing; one that was killed holds nothing."""
    shutil.copytree(one, tmp_path / "one")
    (tmp_path / "one" / "lock").write_text("of one that was killed, which said more than its follower")
    given = ["train", *RUN, "--parts", "4", "--resume", str(tmp_path / "one")]
    through, seen = Run._through, []

    def twice(self, *args):
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        capsys.readouterr()
        code = f"import sys; from timm_dd.cli import main; sys.exit(main({given!r}))"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
        assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        seen.append((done.returncode, done.stderr))
        return through(self, *args)

    monkeypatch.setattr(Run, "_through", twice)
    assert main(given) == 0
    ((status, error),) = seen
    assert status == 1 and error.count("\n") == 1
    assert f"another process trains here: {socket.gethostname()}, pid {os.getpid()}, since 2" in error
    assert not (tmp_path / "one" / "lock").exists()


def test_leftovers_of_a_killed_process_are_removed(one, tmp_path):
    shutil.copytree(one, tmp_path / "one")
    halves = ("parts/0/.summary.json.0123abcd", "global/last/.model.safetensors.89ef0123")
    left = [tmp_path / "one" / name for name in halves]
    theirs = [tmp_path / "one" / name for name in (".gitlab-ci.yml", "parts/.eslintrc.json", ".notes.md")]
    for path in (*left, *theirs):
        path.write_bytes(b"half")
        os.utime(path, (0, 0))
    assert main(["train", *RUN, "--parts", "4", "--resume", str(tmp_path / "one")]) == 0
    assert not any(path.exists() for path in left) and all(path.exists() for path in theirs)


@pytest.mark.slow
def test_torchrun_does_not_go_on_with_the_run_of_another(one, tmp_path):
    shutil.copytree(one, tmp_path / "one")
    arguments = [*RUN, "--parts", "4", "--output", str(tmp_path), "--experiment", "one"]
    done = subprocess.run(
        [*TORCHRUN, "1", "--max-restarts", "1", *MODULE, *arguments], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 1 and done.stderr.count("holds a run already") == 2


def test_resume_finds_the_last_run_that_is_not_done(one, tmp_path):
    def folder(*arguments):
        return Run(options.parse([*RUN, "--parts", "4", "--output", str(tmp_path), *arguments])).folder.path.name

    assert folder("--resume") == folder() == "test_resnet-4"
    for name in ("test_resnet-4", "test_resnet-4-1", "test_resnet-40"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "args.yaml").touch()
    (tmp_path / "test_resnet-4-1" / "summary.json").touch()
    assert folder("--resume") == "test_resnet-4" and folder() == "test_resnet-4-2"
    assert folder("--resume", str(one)) == "one"
    with pytest.raises(TrainError, match="nowhere: no run there"):
        folder("--resume", "nowhere")


def learner(folder, *options_given):
    args = options.parse([*RUN, "--parts", "2", *options_given])
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=10, drop_rate=0.5)
    if args.channels_last:
        model = model.to(memory_format=torch.channels_last)
    return Learner("model", model, None, args, torch.device("cpu"), 5, 4, 7, folder)


def updates(learner, first, last):
    for i in range(first, last):
        generator = torch.Generator().manual_seed(i)
        learner.model.train()
        learner.step(torch.randn(4, 3, 32, 32, generator=generator), torch.randint(10, (4,), generator=generator))
        if learner.updates % 5 == 0:
            learner.end_epoch(10.0 * i, 1.0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:PlateauLRScheduler is deprecated")
@pytest.mark.parametrize("opt", ["sgd", "adamw", "lamb", "lookahead_radam", "rmsproptf"])
@pytest.mark.parametrize("sched", ["cosine", "cosine --sched-on-updates", "plateau", "step", "step --channels-last"])
def test_a_checkpoint_holds_all(opt, sched, tmp_path):
    """Twelve updates at once, or with the middle of an epoch read back from disk by another learner: the same bits."""
    given = ["--opt", opt, "--epochs", "4", "--plateau-epochs", "2", "--clip-grad", "1.0", "--sched", *sched.split()]
    expected, first, second = (learner(tmp_path, *given) for _ in range(3))
    updates(expected, 0, 12)
    updates(first, 0, 7)
    checkpoints.save(first)
    assert checkpoints.restore(second)
    updates(second, 7, 12)
    for a, b in zip(expected.state()[0].items(), second.state()[0].items()):
        assert a[0] == b[0] and torch.equal(a[1], b[1]), a[0]
    assert json.dumps(expected.state()[1]) == json.dumps(second.state()[1])


@pytest.mark.parametrize("opt", ["sgd", "adamw", "lookahead_adam"])
def test_fused_updates_are_the_plain_ones(opt, tmp_path):
    ours, plain = (learner(tmp_path, "--channels-last").model for _ in range(2))
    args = options.parse([*RUN, "--opt", opt])
    fused = optimizers.create(ours, args, 0.01)
    other = create_optimizer_v2(plain, **{**optimizer_kwargs(args), "lr": 0.01})
    assert fused.param_groups[0]["fused"] and not other.param_groups[0]["fused"]
    for _ in range(8):
        for p, q in zip(ours.parameters(), plain.parameters()):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        fused.step()
        other.step()
    for p, q in zip(ours.parameters(), plain.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
@pytest.mark.parametrize("opt", ["sgd", "adamw"])
def test_scaled_gradients_are_those_of_the_loss(opt, device, tmp_path):
    """Updates with a scaler are those of a plain optimizer on gradients without the scale; what overflows is left out,
    and leaves nothing of memory that nobody has set, here NaN, in the next."""
    torch.use_deterministic_algorithms(True)
    args = options.parse([*RUN, "--opt", opt, "--amp", "--amp-dtype", "float16", "--weight-decay", "0"])
    model, expected = (torch.nn.Linear(4, 3, device=device) for _ in range(2))
    expected.load_state_dict(model.state_dict())
    found = Learner("model", model, None, args, torch.device(device), 5, 4, 7, tmp_path)
    plain = create_optimizer_v2(expected, **{**optimizer_kwargs(args), "lr": found.lr})
    for overflows in (True, False, False):
        loss = torch.zeros((), device=device)
        found.optimizer.zero_grad()
        for p, q in zip(model.parameters(), expected.parameters()):
            q.grad = torch.randn_like(q)
            loss = loss + (p * q.grad * (math.inf if overflows else 1)).sum()
        found.scaler.scale(loss).backward()
        found.update(loss.detach(), 4)
        if not overflows:
            plain.step()
    torch.use_deterministic_algorithms(False)
    for p, q in zip(model.parameters(), expected.parameters()):
        torch.testing.assert_close(p, q)


def test_an_optimizer_whose_state_is_not_saved(tmp_path):
    first = learner(tmp_path, "--opt", "adafactorbv")
    updates(first, 0, 1)
    with pytest.raises(TrainError, match="--opt adafactorbv has a state that is not saved"):
        checkpoints.save(first)
    assert list(tmp_path.iterdir()) == []


def test_the_last_two_checkpoints_are_kept_and_a_damaged_one_is_passed_over(tmp_path):
    first = learner(tmp_path)
    for i in range(4):
        updates(first, i, i + 1)
        checkpoints.save(first)
    newest, older = checkpoints.found(tmp_path)
    assert (newest.name, older.name) == ("checkpoint-000000004.safetensors", "checkpoint-000000003.safetensors")
    newest.write_bytes(newest.read_bytes()[:-100])
    second = learner(tmp_path)
    assert checkpoints.restore(second) and second.updates == 3
    older.write_bytes(b"")
    assert not checkpoints.restore(learner(tmp_path))


def test_a_checkpoint_of_which_a_bit_was_flipped_is_passed_over(tmp_path):
    first = learner(tmp_path)
    for i in range(2):
        updates(first, i, i + 1)
        checkpoints.save(first)
    newest = checkpoints.found(tmp_path)[0]
    whole = newest.read_bytes()
    for at in (len(whole) // 2, len(whole) - 1, whole.index(b'"updates') + 15 if b'"updates' in whole else 200):
        newest.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        again = learner(tmp_path)
        assert checkpoints.restore(again) and again.updates == 1


@pytest.mark.parametrize("damage", [
    lambda held: 0, lambda held: [held], lambda held: {}, lambda held: {**held, "options": []},
    lambda held: {**held, "updates": "3"}, lambda held: {**held, "history": [1]},
    lambda held: {**held, "history": [{}]}, lambda held: {**held, "history": [{**held["history"][0], "top1": "x"}]},
])  # fmt: skip
def test_a_checkpoint_whose_numbers_are_damaged_is_passed_over(damage, tmp_path):
    first = learner(tmp_path)
    updates(first, 0, 6)
    checkpoints.save(first)
    updates(first, 6, 7)
    checkpoints.save(first)
    newest, _ = checkpoints.found(tmp_path)
    newest.unlink()
    tensors, numbers = first.state()
    tensorfile.write_state(newest, tensors, {"learner": json.dumps(damage(numbers))})
    again = learner(tmp_path)
    checkpoints.check(tmp_path, again.options)
    assert checkpoints.restore(again) and again.updates == 6


def test_a_checkpoint_of_odd_options_is_no_checkpoint_of_these(tmp_path):
    first = learner(tmp_path)
    tensors, numbers = first.state()
    numbers["options"] = {**numbers["options"], "epochs": "many"}
    tensorfile.write_state(tmp_path / "checkpoint-000000001.safetensors", tensors, {"learner": json.dumps(numbers)})
    for go_on in (lambda: checkpoints.check(tmp_path, first.options), lambda: checkpoints.restore(first)):
        with pytest.raises(TrainError, match="checkpoint-000000001.safetensors does not fit"):
            go_on()


ONE_PART = options.parse([*RUN, "--parts", "1"])
TRAINED_WITH = options.training_identity(options.stage_options(ONE_PART, "part"))
SUMMARY = {"options": TRAINED_WITH, "top1": 50.0, "top5": None, "seconds": 1.0}


@pytest.mark.parametrize("said", [
    "", "{", "null", "[]", "{}", '{"options": 1}', "\0", "\xff", "[" * 100_000, json.dumps({**SUMMARY, "options": []}),
    *(json.dumps({**SUMMARY, name: odd}) for name in ("top1", "seconds") for odd in (None, "x", [], math.nan)),
    json.dumps({**SUMMARY, "top5": "x"}), json.dumps({**SUMMARY, "top1": 10**400}),
])  # fmt: skip
def test_what_is_said_of_a_part_is_not_believed_unseen(said, tmp_path):
    stage = PartsStage(tmp_path, "part", ONE_PART)
    stage.part(0).mkdir()
    stage.finish(0, SUMMARY)
    stage.check(0)
    assert stage.summaries() == [SUMMARY]
    path = stage.part(0) / "summary.json"
    path.write_bytes(said.encode("latin-1"))
    line = rf"{path} is damaged \([^\n]+\); remove {path.parent} to train it again"
    for read in (stage.summaries, lambda: stage.check(0)):
        with pytest.raises(TrainError, match=line):
            read()
    path.unlink()
    os.mkfifo(path)  # waits for a writer
    with pytest.raises(TrainError, match=r"no such file\); remove"):
        stage.summaries()


@pytest.mark.parametrize("name, said", [
    ("args.yaml", b"[1]"), ("args.yaml", b"{"), ("args.yaml", b"text"), ("args.yaml", b"\xff\xfe"),
    ("args.yaml", b"part_threads: many"), ("args.yaml", b"part_threads: -3"), ("parts/1/summary.json", b"{}"),
])  # fmt: skip
@pytest.mark.parametrize("how", [["--resume"], ["--from-parts", "{run}"], ["--only-parts", "0"]])
def test_a_damaged_run_is_named_in_a_line(name, said, how, one, tmp_path, capsys):
    """Before anything is written."""
    run = tmp_path / "one"
    shutil.copytree(one, run)
    (run / name).write_bytes(said)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    given = [*RUN, "--parts", "4", "--output", str(tmp_path), "--experiment", "one"]
    assert main(["train", *given, *(word.format(run=run) for word in how)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{run / name} is damaged (" in line and line.endswith(f"remove {(run / name).parent} to train it again")
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_what_is_kept_is_not_what_was_damaged(tmp_path):
    """A checkpoint that could not be read and stands for more updates than there are now."""
    later = tmp_path / "checkpoint-000000200.safetensors"
    later.write_bytes(b"half")
    again = learner(tmp_path, "--checkpoint-hist", "1")
    assert not checkpoints.restore(again)
    for again.updates in (1, 2):
        checkpoints.save(again)
        assert [p.name for p in checkpoints.found(tmp_path)] == [f"checkpoint-{again.updates:09d}.safetensors"]


def test_a_checkpoint_of_other_options_is_refused(tmp_path):
    checkpoints.save(learner(tmp_path))
    with pytest.raises(TrainError, match=r"--lr was 0.05, not 0.1\); resume with the options"):
        checkpoints.restore(learner(tmp_path, "--lr", "0.1"))
    assert checkpoints.restore(learner(tmp_path, "--workers", "3", "--output", "elsewhere"))


@pytest.mark.slow
def test_a_run_s_folder_is_all_that_resume_needs(tmp_path, capsys, monkeypatch):
    """With more epochs beside it the fine-tuning goes on, at the rate of a schedule that is so long; the parts stay."""
    monkeypatch.chdir(tmp_path)
    few = ["--parts", "2", "--train-num-samples", "64", "--val-num-samples", "20", "-b", "32", "--baseline"]
    assert main(["train", *RUN, *few, "--output", ".", "--experiment", "one"]) == 0
    shutil.copytree("one", "two")
    assert main(["train", "--resume", "two"]) == 0
    one, two = tmp_path / "one", tmp_path / "two"
    assert same_files(one, two, *WEIGHTS, "baseline/last/model.safetensors")
    summaries = [json.loads((run / "summary.json").read_text()) for run in (one, two)]
    for summary in summaries:  # the parts are composed once more
        del summary["seconds"]["compose"], summary["seconds"]["statistics"]
    assert summaries[0] == summaries[1]
    capsys.readouterr()
    assert main(["train", "--resume", str(next(two.glob("global/checkpoint-*"))), "--epochs", "2"]) == 0
    rate = 0.05 / 4 * 0.5  # of --tune-rate, in the middle of a cosine
    line = f"composed model: 1 epochs before, 2 now; after 1 of them the learning rate goes on at {rate:.3g}"
    assert line in (said := capsys.readouterr().out), said
    assert len(curve(two)) == 3 and curve(two)[1] == curve(one)[1]
    assert bytes_of_parts(one, 2) == bytes_of_parts(two, 2)
    assert len((two / "baseline/summary.csv").read_text().splitlines()) == 5, "as many as parts and whole"


@pytest.mark.parametrize(
    "given, line",
    [("--resume nothing", "--resume 'nothing': no run there"), ("--resume auto", "nothing to train on"),
     ("--resume {one} --part-epochs 3", "part 0 is done, with other options (for the parts, --epochs was 2, not 3)"),
     ("--resume {one} --epochs 0", "does not fit (--epochs was 1, not 0)"),
     ("--resume {one} elsewhere", "--data-dir has no effect beside --dataset digits")],
)  # fmt: skip
def test_what_resume_cannot_go_on_with(given, line, one, capsys):
    with contextlib.suppress(SystemExit):
        assert main(["train", *given.format(one=one).split()]) == 1
    assert line in capsys.readouterr().err


def test_options_of_the_run_that_goes_on(one, tmp_path):
    before, now = (options.parse(a) for a in (["-c", str(one / "args.yaml")], ["--resume", str(one), "-j", "3"]))
    changed = {k for k in vars(before) if getattr(before, k) != getattr(now, k)}
    assert changed == {"config", "resume", "workers"} and (now.config, now.workers) == (None, 3)
    assert options.parse(["--resume", str(one / "global" / "summary.csv")]).resume == str(one)
