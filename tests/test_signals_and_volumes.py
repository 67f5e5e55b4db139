"""The whole method in 1D and 3D, from data to the composed model: parts, composition, fine-tuning, files."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from torch import nn

import timm_dd
from timm_dd import Domain
from timm_dd.reports.verify import verify


def signals():
    """scikit-learn's digits, read row by row: (1797, 1, 64), 10 classes."""
    digits = load_digits()
    return torch.tensor(digits.data / 16, dtype=torch.float32)[:, None], torch.tensor(digits.target)


def volumes(n=800, side=12):
    """Noise with waves along one of the three axes, of any phase: (n, 1, side, side, side), 3 classes."""
    generator = torch.Generator().manual_seed(0)
    x = 1.5 * torch.randn(n, 1, side, side, side, generator=generator)
    y = torch.randint(3, (n,), generator=generator)
    waves = torch.sin(torch.arange(side) * torch.pi / 2 + 2 * torch.pi * torch.rand(n, 1, generator=generator))
    for volume, axis, wave in zip(x[:, 0], y.tolist(), waves):
        volume.movedim(axis, -1).add_(wave)
    return x, y


def network(dims, classes, size):
    conv = {1: nn.Conv1d, 3: nn.Conv3d}[dims]
    norm = {1: nn.BatchNorm1d, 3: nn.BatchNorm3d}[dims]
    body = nn.Sequential(conv(1, 16, 3, stride=2), norm(16), nn.ReLU(), conv(16, 32, 1), nn.ReLU(), nn.Flatten())
    features = body(torch.zeros(2, 1, *size)).shape[1]
    return nn.Sequential(body, nn.Linear(features, 32), nn.ReLU(), nn.Linear(32, classes))


def train(net, x, y, steps):
    optimizer, generator = torch.optim.Adam(net.parameters(), 3e-3), torch.Generator().manual_seed(1)
    net.train()
    for _ in range(steps):
        batch = torch.randint(len(x), (64,), generator=generator)
        loss = F.cross_entropy(net(x[batch]), y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.eval()


@torch.no_grad()
def accuracy(net, x, y):
    return float((net(x).argmax(1) == y).double().mean())


@pytest.mark.parametrize(
    "make, domain, steps", [(signals, Domain.grid(4), 150), (volumes, Domain.grid(2, 1, 2), 150)], ids=["1D", "3D"]
)
def test_from_data_to_the_composed_model(make, domain, steps, tmp_path):
    x, y = make()
    size, classes = x.shape[2:], int(y.max()) + 1
    held = torch.arange(len(x)) % 5 == 0
    train_x, train_y, val_x, val_y = x[~held], y[~held], x[held], y[held]
    model = network(len(size), classes, size)

    parts = timm_dd.split(model, domain.parts, domain=domain, example_input=x[:1])
    for part, crop in zip(parts, parts.crops(train_x)):
        train(part, crop, train_y, steps)
    parts.save(tmp_path / "parts")
    composed = timm_dd.merge(timm_dd.Parts.load(tmp_path / "parts", model), model=model).eval()

    report = verify(composed, parts, x=val_x[:4], batches=[(val_x, val_y)])  # boxes start at multiples of the stride
    assert report.box_exact and report.failures == []
    assert report.labelled.accuracy > max(report.labelled.accuracies) > 150 / classes

    tuned = train(composed, train_x, train_y, steps)
    assert accuracy(tuned, val_x, val_y) > 0.9
    timm_dd.merge_files(tmp_path / "parts", tmp_path / "composed")
    again = network(len(size), classes, size)
    again.load_state_dict(load_file(tmp_path / "composed" / "model.safetensors"))
    merged = timm_dd.merge(tmp_path / "parts", model=model).eval()
    assert torch.equal(again.eval()(val_x), merged(val_x))
