"""What is exported gives the network's own scores, where no timm_dd is."""

import shutil
import subprocess
import sys

import pytest
import torch

import timm_dd
from timm_dd import Domain, TwoLevel
from timm_dd.cli import main

LOAD = {
    ".pt2": "import torch as t; f = t.export.load(path).module(); run = lambda x: f(t.from_numpy(x)).detach().numpy()",
    ".onnx": "import onnxruntime as o; s = o.InferenceSession(path); run = lambda x: s.run(None, {'images': x})[0]",
}
CODE = """
import sys; import numpy as np; path, x, y = sys.argv[1:]
{load}
np.save(y, run(np.load(x)))
assert "timm_dd" not in sys.modules and "timm" not in sys.modules
"""


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """On disk: unequal ones, with BatchNorm statistics that are not 0 and 1."""
    folder = tmp_path_factory.mktemp("parts")
    split = timm_dd.split("test_resnet", 3, domain=Domain.grid(1, 3, overlap=4), num_classes=5, img_size=48, seed=0)
    split.train()(torch.randn(8, 3, 48, 48, generator=torch.Generator().manual_seed(0)))
    split.save(folder)
    return folder


@pytest.fixture(params=["composed", "vote", "dnn"])
def network(request, parts, tmp_path):
    """(folder, the network)."""
    folder = tmp_path / request.param
    if request.param == "composed":
        timm_dd.merge_files(parts, folder)
        return folder, timm_dd.merge(parts).eval()
    two = TwoLevel(timm_dd.Parts.load(parts), request.param, widths=(8,))
    two.save(folder)
    return folder, two.eval()


@pytest.mark.parametrize("form", LOAD)
def test_an_export_gives_the_scores_of_the_network(network, form, tmp_path, capsys):
    import numpy as np

    folder, model = network
    path, x, y = tmp_path / f"model{form}", tmp_path / "x.npy", tmp_path / "y.npy"
    assert main(["export", str(folder), "-o", str(path)]) == 0
    assert str(path) in capsys.readouterr().out
    for n in (1, 5):
        batch = torch.randn(n, 3, 48, 48, generator=torch.Generator().manual_seed(n))
        np.save(x, batch.numpy())
        command = [sys.executable, "-c", CODE.format(load=LOAD[form]), str(path), str(x), str(y)]
        subprocess.run(command, check=True, cwd=tmp_path)
        with torch.no_grad():
            expected = model(batch)
        torch.testing.assert_close(
            torch.from_numpy(np.load(y)), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max())
        )


@pytest.mark.parametrize(
    "output, message", [("model.pt", "ends with .onnx or .pt2"), ("model", "ends with"), ("no/x.pt2", "cannot write")]
)
def test_bad_names(parts, output, message, tmp_path, capsys):
    timm_dd.merge_files(parts, tmp_path / "composed")
    assert main(["export", str(tmp_path / "composed"), "-o", str(tmp_path / output)]) == 1
    assert message in capsys.readouterr().err and not (tmp_path / output).exists()


def test_folders_without_a_network(parts, tmp_path, capsys):
    for folder, why in ((parts, "no network in"), (tmp_path / "none", "no network in"), ("x" * 300, "cannot be read")):
        assert main(["export", str(folder), "-o", str(tmp_path / "x.pt2")]) == 1
        assert why in capsys.readouterr().err
    timm_dd.merge_files(parts, tmp_path / "composed")
    weights = tmp_path / "composed" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    assert main(["export", str(tmp_path / "composed"), "-o", str(tmp_path / "x.pt2")]) == 1
    assert "no model of timm" in capsys.readouterr().err and not (tmp_path / "x.pt2").exists()


def test_onnx_is_one_file_or_none(parts, tmp_path, capsys, monkeypatch):
    """Above a size of its own torch writes the weights into a second file, under the name that the first had then."""
    timm_dd.merge_files(parts, tmp_path / "composed")
    monkeypatch.setattr("torch.onnx._internal.exporter._onnx_program._LARGE_MODEL_THRESHOLD", 1)
    (tmp_path / "out").mkdir()
    path = tmp_path / "out" / "x.onnx"
    assert main(["export", str(tmp_path / "composed"), "-o", str(path)]) == 0
    assert list(path.parent.iterdir()) == [path]
    path.unlink()
    monkeypatch.setattr("timm_dd.export.LARGEST", 1)
    assert main(["export", str(tmp_path / "composed"), "-o", str(path)]) == 1
    assert "a file of ONNX holds" in capsys.readouterr().err and list(path.parent.iterdir()) == []


def test_parts_in_half_are_exported_in_float32(parts, tmp_path):
    half = timm_dd.Parts.load(parts).half()
    TwoLevel(half, "sum").save(tmp_path / "two")
    assert main(["export", str(tmp_path / "two"), "-o", str(tmp_path / "x.pt2")]) == 0
    x = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        found, expected = torch.export.load(tmp_path / "x.pt2").module()(x), sum(half.float().eval()(x))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_another_result_is_not_written(parts, tmp_path, capsys, monkeypatch):
    timm_dd.merge_files(parts, tmp_path / "composed")
    monkeypatch.setattr("timm_dd.export.TOLERANCE", -1.0)
    assert main(["export", str(tmp_path / "composed"), "-o", str(tmp_path / "x.pt2")]) == 1
    assert "scores differ" in capsys.readouterr().err and list(tmp_path.iterdir()) == [tmp_path / "composed"]


def test_a_run_gives_its_fine_tuned_model(parts, tmp_path, capsys):
    run = tmp_path / "run"
    timm_dd.merge_files(parts, run / "global" / "best")
    (run / "args.yaml").touch()
    assert main(["export", str(run), "-o", str(tmp_path / "x.pt2")]) == 0
    shutil.rmtree(run / "global")
    assert main(["export", str(run), "-o", str(tmp_path / "y.pt2")]) == 1
    assert "no network in" in capsys.readouterr().err
