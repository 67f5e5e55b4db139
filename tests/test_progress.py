"""What a run says while it trains: lines with the time left, and at its end the best epoch and top-5."""

import json

import pytest
import torch
from conftest import RUN

import timm_dd
from timm_dd import Domain
from timm_dd.cli import main
from timm_dd.text import duration
from timm_dd.train.epochs.progress import Progress, after_parts, filled, seconds_of
from timm_dd.train.settings import options
from timm_dd.train.stages.summary import summary_table


def lines(interval, later, batches=25, epochs=2, wait=0.0):
    """By epoch and batch, of a training in which a batch takes two seconds, the first a minute."""
    now = [0.0]
    progress, found = Progress("parts", epochs, batches, interval, later, lambda: now[0]), {}
    for epoch in range(epochs):
        for batch in range(batches):
            now[0] += 60 if (epoch, batch) == (0, 0) else 2
            if line := progress.line(epoch, batch):
                found[epoch, batch] = line
        now[0] += wait
    return found


def test_a_line_every_so_many_batches_with_the_time_left():
    assert lines(10, None) == {
        (0, 9): "parts 1/2, batch 10/25: 80 s left",
        (0, 19): "parts 1/2, batch 20/25: 60 s left",
        (1, 9): "parts 2/2, batch 10/25: 30 s left",
        (1, 19): "parts 2/2, batch 20/25: 10 s left",
    }
    late = lines(10, None, wait=48)  # of validation, in which the next ones have a share
    assert late[1, 9] == "parts 2/2, batch 10/25: 51 s left", "34 batches took 116 s"


def test_what_the_whole_run_takes_is_known_after_the_first_batches():
    assert lines(None, 3.0) == {
        (0, 10): "parts 1/2, batch 11/25: 78 s left of this stage; the whole run takes about 7 min"
    }
    assert list(lines(None, 3.0, batches=4)) == [(0, 3)], "or after the first epoch"
    assert lines(None, None) == {}


def test_what_follows_the_parts():
    """By hand: a rank's parts cost 2 · 10 epochs, and so on."""
    macs = {"parts": [2, 3, 2, 3], "joint": 20, "composed": 32, "two_level": {"coherent": 11}}
    given = "DATA --parts 4 --part-epochs 10 --epochs 5 --joint-epochs 2 --warmup-epochs 0".split()
    args = options.parse(given)
    assert after_parts(args, macs, 1.0, range(4), 1) == pytest.approx((2 * 20 + 5 * 32) / (10 * 10))
    assert after_parts(args, macs, 1.0, [0, 2], 2) == pytest.approx((2 * 20 * 0.4 + 5 * 16) / (10 * 4))
    more = options.parse([*given, "--baseline", "--cycles", "2", "--cooldown-epochs", "1"])
    cycle = 11 * 10 + 3 * 20 + 6 * 16
    assert after_parts(more, macs, 0.5, range(4), 1) == pytest.approx((2 * cycle - 110 + 16 * 16) / 110)
    assert after_parts(options.parse([*given, "--part-epochs", "0"]), macs, 1.0, range(4), 1) is None


@pytest.mark.parametrize(
    "seconds, text",
    [(0.4, "0 s"), (99, "99 s"), (100, "2 min"), (3569, "59 min"), (3600, "1 h 0 min"), (7260, "2 h 1 min"),
     (172799, "2 d 0 h"), (300000, "3 d 11 h")],
)  # fmt: skip
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_the_table_names_the_best_epoch_and_top_5(one):
    summary = json.loads((one / "summary.json").read_text())
    head, *rows = summary_table(summary, options.parse([*RUN, "--parts", "4"])).splitlines()
    assert head.split()[:4] == ["top-1", "%", "top-5", "%"]
    cells = {row[:34].strip(): row[34:].split() for row in rows}
    epochs = [line.split(",") for line in (one / "global" / "summary.csv").read_text().splitlines()]
    assert epochs[0][:5] == ["epoch", "train_loss", "eval_top1", "eval_top5", "eval_loss"]
    best = max(range(1, len(epochs)), key=lambda i: float(epochs[i][2]))
    found = cells["composed, best epoch"]
    assert found[:3] == [f"{float(epochs[best][2]):.2f}", f"{float(epochs[best][3]):.2f}", str(best)]
    for name, key in (("composed, after fine-tuning", "tuned"), ("baseline, random start", "baseline")):
        assert cells[name][:2] == [f"{summary[key]:.2f}", f"{summary['top5'][key]:.2f}"]
        assert summary["top5"][key] >= summary[key]


def test_a_network_is_timed_without_a_trace():
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Dropout(0.5))
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    assert 0 < seconds_of(net, (3, 8, 8), torch.device("cpu"), 1) < 10
    assert torch.equal(torch.get_rng_state(), before) and torch.get_num_threads() == threads


class Indexed(torch.nn.Module):
    """A table, read at places that are not in the state dict, as positions in a window are."""

    def __init__(self):
        super().__init__()
        self.conv, self.table = torch.nn.Conv2d(3, 4, 3), torch.nn.Parameter(torch.rand(49, 4))
        self.register_buffer("index", torch.arange(4), persistent=False)

    def forward(self, x):
        return self.conv(x).mean((2, 3)) + self.table[self.index].mean(0)


def test_a_network_without_numbers_is_timed():
    graph = timm_dd.split(Indexed(), 2, example_input=torch.rand(2, 3, 8, 8), domain=Domain.full(2)).graph
    network = filled(graph, torch.device("cpu"))
    assert not network.index.any() and (network.table == 0.01).all()
    assert seconds_of(network, (3, 8, 8), torch.device("cpu"), 1) > 0


def test_what_cannot_be_timed_is_trained_all_the_same(tmp_path, monkeypatch):
    """An estimate is nothing that a run ends for."""

    def fail(*_):
        raise IndexError("index 49 is out of bounds")

    monkeypatch.setattr("timm_dd.train.stages.parts.seconds_of", fail)
    given = [
        "--part-epochs",
        "1",
        "--joint-epochs",
        "0",
        "--epochs",
        "0",
        "--output",
        str(tmp_path),
        "--experiment",
        "run",
    ]
    assert main(["train", *RUN, *given]) == 0
