"""The page of a run in a real browser: Debian's chromium, headless."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

import timm_dd
from timm_dd.cli import main

pytest.importorskip("matplotlib")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium")
CIFAR = Path(__file__).parents[2] / "shared" / "data" / "cifar10"  # as the benchmarks have it
SECTIONS = ["happened", "curves", "times", "boxes", "weights", "maps", "look", "right", "again"]
LEAST = 4.5  # contrast of text, WCAG AA

# What the browser has made of the page, as JSON in an element of its own.
PROBE = """
<pre id="probe"></pre>
<script>
const luminance = (c) => {
  const [r, g, b] = c.map((v) => v / 255).map((v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const colour = (text) => { const n = (text.match(/[\\d.]+/g) || []).map(Number); return n.length < 3 ? null : n; };
const opaque = (c) => c !== null && (c.length === 3 || c[3] > 0.99);
const behind = (e) => {
  for (; e; e = e.parentElement) { const c = colour(getComputedStyle(e).backgroundColor); if (opaque(c)) return c; }
  return [255, 255, 255];
};
const contrasts = [];
for (const e of document.querySelectorAll("body *")) {
  const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
  if (!own || ["SCRIPT", "STYLE", "title"].includes(e.tagName) || e.id === "probe") continue;
  const style = getComputedStyle(e), ink = colour(e.ownerSVGElement ? style.fill : style.color);
  const [a, b] = [luminance(ink), luminance(behind(e))].sort((x, y) => y - x);
  contrasts.push([(a + 0.05) / (b + 0.05), e.tagName + ": " + e.textContent.trim().slice(0, 40)]);
}
contrasts.sort((x, y) => x[0] - y[0]);
const pictures = [...document.querySelectorAll("img, svg")];
document.getElementById("probe").textContent = JSON.stringify({
  width: document.documentElement.scrollWidth, client: document.documentElement.clientWidth,
  sections: [...document.querySelectorAll("section[id]")].filter((s) => s.offsetHeight > 40).map((s) => s.id),
  pictures: pictures.length,
  unnamed: pictures.filter((p) => !(p.getAttribute("alt") || p.getAttribute("aria-label"))).length,
  empty: pictures.filter((p) => p.getBoundingClientRect().height < 50).length,
  texts: contrasts.length, lowest: contrasts[0],
});
</script>
"""


def chromium(page, folder, *options):
    """Its standard output and its log."""
    words = [
        CHROMIUM,
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--enable-logging=stderr",
    ]
    words += [f"--user-data-dir={folder / 'profile'}", "--disable-dev-shm-usage", *options, page.as_uri()]
    done = subprocess.run(words, capture_output=True, text=True, timeout=240)
    return done.stdout, done.stderr


def probe(page, folder, *options):
    """What `PROBE` says in a frame of so many pixels; headless windows are not narrower than 500."""
    probed = folder / "probed.html"
    probed.write_text(page.read_text().replace("</body>", f"{PROBE}</body>"))
    dom, log = chromium(probed, folder, "--dump-dom", *options)
    assert "CONSOLE" not in log, log
    return json.loads(re.search(r'<pre id="probe">(.*?)</pre>', dom, re.S)[1].replace("&amp;", "&"))


@pytest.fixture(scope="module")
def page(one, tmp_path_factory):
    output = tmp_path_factory.mktemp("browser") / "one.html"
    timm_dd.report(one, output, images=40)
    return output


@pytest.fixture(scope="module")
def page_of_cifar(tmp_path_factory):
    """Of a short run on photographs, boxes and two levels."""
    if not CIFAR.is_dir():
        pytest.skip(f"no CIFAR-10 in {CIFAR}")
    folder = tmp_path_factory.mktemp("cifar")
    given = f"--data-dir {CIFAR} --model dd_resnet20 --model-kwargs widths=(8,16,32) --overlap 4 --baseline"
    given += " --train-num-samples 256 --val-num-samples 100 -b 64 -j 0 --part-epochs 1 --epochs 1 --aggregate mean dnn"
    assert main(["train", *given.split(), "--output", str(folder), "--experiment", "run"]) == 0
    timm_dd.report(folder / "run", folder / "page.html", images=40)
    return folder / "page.html"


@needs_chromium
@pytest.mark.slow
@pytest.mark.parametrize("run", ["page", "page_of_cifar"])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_in_a_browser(width, dark, run, request, tmp_path):
    theme = ["--blink-settings=preferredColorScheme=0"] if dark else []
    found = probe(request.getfixturevalue(run), tmp_path, f"--window-size={width},900", *theme)
    assert found["sections"] == SECTIONS
    assert found["width"] <= found["client"]
    assert found["pictures"] >= 20 and found["unnamed"] == found["empty"] == 0
    assert found["texts"] > 100 and found["lowest"][0] >= LEAST, found["lowest"]


@needs_chromium
@pytest.mark.slow
def test_on_a_phone(page, tmp_path):
    """In a frame of 390 pixels, since a window is not that narrow everywhere."""
    frame = tmp_path / "frame.html"
    probed = tmp_path / "probed.html"
    probed.write_text(page.read_text().replace("</body>", f"{PROBE}</body>"))
    frame.write_text(
        f'<body style="margin:0"><iframe id="f" src="{probed.name}" style="width:390px;height:800px;border:0"></iframe>'
        "<pre id='out'></pre><script>addEventListener('message', (e) => out.textContent = e.data)</script>"
    )
    told = "parent.postMessage(document.getElementById('probe').textContent, '*');</script>\n</body>"
    probed.write_text(probed.read_text().replace("</script>\n</body>", told))
    dom, _ = chromium(frame, tmp_path, "--dump-dom", "--virtual-time-budget=5000", "--window-size=800,900")
    found = json.loads(re.search(r"<pre id=\"out\">(.*?)</pre>", dom, re.S)[1].replace("&amp;", "&"))
    assert found["client"] == 390 and found["width"] <= 390


@needs_chromium
@pytest.mark.slow
def test_screenshots_show_something(page, tmp_path):
    for theme in ([], ["--blink-settings=preferredColorScheme=0"]):
        shot = tmp_path / "shot.png"
        chromium(page, tmp_path, f"--screenshot={shot}", "--window-size=1280,2000", *theme)
        image = Image.open(shot)
        corner = image.convert("L").getpixel((2, 2))
        assert image.size == (1280, 2000) and len(image.convert("RGB").getcolors(1 << 24)) > 500
        assert (corner < 60) == bool(theme)
