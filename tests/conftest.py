"""What the tests share: shaken weights, networks that nobody else has, and a training run."""

import os
import signal
import socket
import subprocess
import sys
import warnings
from collections import Counter

import huggingface_hub
import pytest
import torch
from hub_server import HubServer
from huggingface_hub import constants
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

import timm_dd
import timm_dd.reports.verify
from timm_dd.cli import main
from timm_dd.planning import planner
from timm_dd.planning.tracer import Tracer
from timm_dd.storage.files import part_name

NARROW = "too few channels for"  # the warning of what is replicated
RELATIVE = 1e-9  # in float64: the bar of an exact claim


def pytest_configure():
    """Processes of tests side by side, and what they start, have a thread each: more than cores slow down all."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        os.environ["OMP_NUM_THREADS"] = "1"
        torch.set_num_threads(1)


def shake(parts, seed=0):
    """Random weights and statistics in float64, so that no zero and no unit variance hides a mistake."""
    generator = torch.Generator().manual_seed(seed)
    for part in parts:
        part.double().eval()
        with torch.no_grad():
            for p in part.parameters():
                p.add_(0.3 * torch.randn(p.shape, generator=generator, dtype=torch.float64) * (p.abs() + 0.1))
            for name, b in part.named_buffers():
                if name.endswith("running_var"):
                    b.copy_(1 + torch.rand(b.shape, generator=generator, dtype=torch.float64))
                elif name.endswith("running_mean"):
                    b.copy_(0.2 * torch.randn(b.shape, generator=generator, dtype=torch.float64))
    return parts


def images(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def outputs(value):
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for v in (value.values() if isinstance(value, dict) else value) for t in outputs(v)]


@torch.no_grad()
def sum_error(parts, merged, x):
    """|F(x) - sum_k F_k(x)| / |F(x)|, every part seeing all of x: theorem 2.1 (2). Of several outputs, the worst."""
    whole, *own = (outputs(m(x)) for m in (merged.double().eval(), *parts))
    return max(float((w - sum(terms)).norm() / w.norm()) for w, *terms in zip(whole, *own))


@torch.no_grad()
def check_split(parts, reason=None):
    """The sum of the parts' outputs against the merged network's, as the plan says; the round trip bit for bit."""
    shake(parts)
    plan = parts.plan
    x = images(1, *plan.input_size)
    merged = timm_dd.merge(parts)
    error = sum_error(parts, merged, x)
    if reason is None:
        assert plan.exact, plan.approximations
        assert error <= RELATIVE
    else:
        assert any(reason in why for *_, why in plan.approximations), plan.approximations
        assert error > RELATIVE
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=NARROW)  # as of the first split
        again = timm_dd.split(merged, len(parts), domain=plan.domain, example_input=x)
    for part, back in zip((p.state_dict() for p in parts), (p.state_dict() for p in again)):
        for key, t in part.items():
            assert t.shape == plan.tensors[key].shape or torch.equal(t, back[key]), key


class Plain(nn.Module):
    """A plain network without BatchNorm: 3×3 convolutions, ReLU, global average pooling, classifier."""

    def __init__(self, width=64, depth=5, num_classes=10, in_chans=3):
        super().__init__()
        self.num_classes, self.in_chans, self.num_features = num_classes, in_chans, width
        widths = [in_chans] + [width] * depth
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1, bias=False) for a, b in zip(widths, widths[1:]))
        self.fc = nn.Linear(width, num_classes)
        for m in self.convs:
            nn.init.kaiming_normal_(m.weight, mode="fan_in", nonlinearity="relu")

    def forward(self, x):
        for conv in self.convs:
            x = torch.relu(conv(x))
        return self.fc(x.mean((2, 3)))


_CFG = dict(
    input_size=(3, 16, 16), num_classes=10, mean=(0.5,) * 3, std=(0.5,) * 3, first_conv="convs.0", classifier="fc"
)
default_cfgs = generate_default_cfgs({"dd_plain.test": _CFG})


@register_model
def dd_plain(pretrained=False, **kwargs):
    return build_model_with_cfg(Plain, "dd_plain", pretrained, **kwargs)


# What touches the insides of torch, timm and huggingface_hub: also tried with the oldest versions of pyproject.toml,
# where rules, which are the same for any K, are tried for one.
INSIDES = {
    "test_compat", "test_files", "test_format", "test_hub", "test_packed", "test_profile", "test_rules",
    "test_theorem", "test_train",
}  # fmt: skip

OTHER_K = {("test_rule", 3), ("test_rule", 4)}


def pytest_collection_modifyitems(items):
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        if item.path.stem in INSIDES and (item.originalname, params.get("parts", 2)) not in OTHER_K:
            item.add_marker("versions")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def counts(monkeypatch):
    """How often a network was traced and planned since the test began, or since it cleared this."""
    found = Counter()

    def counted(name, function):
        def call(*args, **kwargs):
            found[name] += 1
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(Tracer, "trace", counted("trace", Tracer.trace))
    for module in (planner, timm_dd.reports.verify):
        monkeypatch.setattr(module, "analyse", counted("plan", module.analyse))
    return found


# ---- training runs

RUN = [
    "--dataset", "digits", "--model", "test_resnet", "--overlap", "4", "--shift", "2", "--part-epochs", "2",
    "--epochs", "1", "--warmup-epochs", "0", "--lr", "0.05", "-b", "64", "-j", "0", "--drop-path", "0.2",
    "--train-num-samples", "256", "--device", "cpu",
]  # fmt: skip


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
MODULE = ["-m", "timm_dd.train"]


def torchrun(ranks, *arguments):
    return subprocess.run([*TORCHRUN, str(ranks), *MODULE, *arguments], capture_output=True, text=True, timeout=300)


def bytes_of_parts(run, parts):
    return [(run / "parts" / str(k) / part_name(k, parts)).read_bytes() for k in range(parts)]


@pytest.fixture(scope="session")
def one(tmp_path_factory):
    """A run in one process, with the baseline."""
    folder = tmp_path_factory.mktemp("runs")
    assert main(["train", *RUN, "--parts", "4", "--baseline", "--output", str(folder), "--experiment", "one"]) == 0
    return folder / "one"


# ---- the Hub


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub on loopback for this process, which has imported huggingface_hub: its environment would come too late."""
    with HubServer() as server:
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        own = {"ENDPOINT": server.url, "HUGGINGFACE_CO_URL_TEMPLATE": template, "HF_HUB_CACHE": str(tmp_path / "hub")}
        for name, value in {**own, "HF_HUB_DISABLE_XET": True, "HF_HUB_OFFLINE": False}.items():
            monkeypatch.setattr(constants, name, value)
        for name, value in server.env(tmp_path / "home").items():
            monkeypatch.setenv(name, value)
        huggingface_hub.close_session()  # a client reads the proxies as it is made
        yield server
    huggingface_hub.close_session()


def kill_a_rank(command, rank, title):
    """Start torchrun, and kill one of its processes as soon as the run says `title`."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1)
    next(line for line in process.stdout if title in line)
    with open(f"/proc/{process.pid}/task/{process.pid}/children") as f:
        os.kill(list(map(int, f.read().split()))[rank], signal.SIGKILL)
    process.communicate(timeout=120)
    assert process.returncode != 0


@pytest.fixture
def free_port():
    """A function that gives a port of this machine that nobody has."""

    def found():
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            return s.getsockname()[1]

    return found
