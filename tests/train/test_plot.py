"""Pictures of runs: what is drawn, how long curves are smoothed, the page that needs nothing else."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from swiftlite.cli.main import main
from swiftlite.train.plot import curves_of, panels_of, plot_runs, running_mean, title_of
from swiftlite.utils.errors import UsageError
from tests.browser import Page

SHORT = [{"step": s, "loss": 2.0 - s / 10, "lr": 1e-5, "own/metric": s, "note": "text"} for s in range(1, 9)]
LONG = [{"step": s, "loss": 2.0 + (s % 2) / 10} for s in range(1, 401)] + [{"step": 400, "eval_loss": 2.0}]


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for name, history in (("short", SHORT), ("long", LONG)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "logging.jsonl").write_text("".join(json.dumps(line) + "\n" for line in history))
    said = {"model": "/models/Qwen3-8B", "dataset": ["data/a.jsonl#500"], "train_type": "lora"}
    (tmp_path / "short/args.json").write_text(json.dumps(said))
    return tmp_path


def test_panels_are_those_of_the_log_and_those_that_are_asked_for() -> None:
    assert [p.names for p in panels_of({"": SHORT})] == [("loss",), ("lr",)]
    assert [p.names for p in panels_of({"": LONG})] == [("loss", "eval_loss")]
    asked = panels_of({"": SHORT}, ["own/metric", "learning_rate", "lr", "loss"])
    assert [p.names for p in asked] == [("own/metric",), ("lr",), ("loss",)]
    for word in ("note", "mfu"):
        with pytest.raises(UsageError, match=f"--panels {word}: no run has it; there are loss, lr, own/metric"):
            panels_of({"": SHORT}, [word])


def test_only_long_curves_are_smoothed() -> None:
    (short,) = curves_of({"a": SHORT}, panels_of({"a": SHORT})[0])
    assert short.smooth is None and short.values[0] == pytest.approx(1.9)
    long, evaluation = curves_of({"a": LONG}, panels_of({"a": LONG})[0])
    assert evaluation.smooth is None
    assert long.smooth is not None and max(long.smooth[20:]) - min(long.smooth[20:]) < 0.02


def test_values_that_cannot_be_drawn_are_left_out() -> None:
    log = [
        {"step": s, "loss": float("inf" if s == 9 else s), "mfu": 0.1, "eval_loss": float("nan")} for s in range(200)
    ]
    assert [p.names for p in panels_of({"a": log})] == [("loss",), ("mfu",)]
    loss, flat = (curves_of({"a": log}, panel)[0] for panel in panels_of({"a": log}))
    assert len(loss.values) == 199 and loss.smooth is not None and max(loss.smooth) < 200
    assert flat.smooth is None  # sums of rounded numbers would make it waves


def test_the_running_mean_does_not_lag() -> None:
    line = [float(i) for i in range(400)]
    assert running_mean(line)[:390] == pytest.approx(line[:390])
    assert running_mean([3.0] * 200) == pytest.approx([3.0] * 200)


def test_title(runs: Path) -> None:
    assert re.fullmatch(r"short: Qwen3-8B, lora, a.jsonl#500, \d{4}-\d\d-\d\d", title_of(runs / "short"))
    assert re.fullmatch(r"long: \d{4}-\d\d-\d\d", title_of(runs / "long"))


@pytest.mark.parametrize("names", [["short"], ["short", "long"]])
def test_plot_writes_a_picture(runs: Path, names: list[str]) -> None:
    target = runs / "pictures/out.png"
    assert main(["plot", *(str(runs / name) for name in names), "--output", str(target), "--log_scale", "true"]) == 0
    assert target.read_bytes().startswith(b"\x89PNG") and target.stat().st_size > 20_000


def test_nothing_to_draw_is_no_picture(tmp_path: Path) -> None:
    assert plot_runs({"": [{"step": 1}]}, tmp_path / "x.png") is None


def test_the_page_needs_nothing_else(runs: Path) -> None:
    pytest.importorskip("plotly")
    words = ["plot", str(runs / "short"), str(runs / "long"), "--output", str(runs / "x.png")]
    assert main([*words, "--html", str(runs / "x.html")]) == 0
    page = (runs / "x.html").read_text(encoding="utf-8")
    assert not re.search(r"<(?:script|link|img|iframe)[^>]*\s(?:src|href)=", page)  # also no relative one
    assert "Plotly.newPlot" in page and "gradient" not in page.rpartition("Plotly.newPlot")[2]
    for curve in ("short loss", "long eval_loss", "short lr"):
        assert f"{curve}%{{_xother}}\\u003cextra" in page


def test_the_page_in_a_browser(runs: Path, page: Page) -> None:
    """Dragging zooms all panels, names hide their curves, values are under the mouse; nothing comes from elsewhere."""
    pytest.importorskip("plotly")
    words = ["plot", str(runs / "short"), str(runs / "long"), "--panels", "loss", "lr", "--log_scale", "true"]
    assert main([*words, "--output", str(runs / "x.png"), "--html", str(runs / "x.html")]) == 0
    address = page.open(runs / "x.html")
    drawn = "document.querySelector('.js-plotly-plot')"
    ranges = f"(l => [l.xaxis.range, l.xaxis2.range, l.yaxis.range])({drawn}._fullLayout)"
    steps, same, _ = before = page.until(ranges)
    assert steps == same and steps[0] < 1 and steps[1] > 400

    def at(x: float, y: float, what: str = ".nsewdrag") -> tuple[float, float]:
        """A place in the first element of a kind: here a panel to drag in. x, y: from its left and upper edge, of 1."""
        box = f"(box => [box.x, box.y, box.width, box.height])({drawn}.querySelector('{what}').getBoundingClientRect())"
        left, top, width, height = page.value(box)
        return left + x * width, top + y * height

    page.mouse(at(0.5, 0.5))
    assert page.until("document.querySelector('.hoverlayer').textContent").startswith("step 20")
    page.mouse(at(0.25, 0.2), at(0.4, 0.4), at(0.5, 0.6), pressed=True)
    steps, same, losses = page.until(ranges, lambda found: found != before)
    assert steps == same and 95 < steps[0] < 105 and 195 < steps[1] < 205
    assert losses[1] - losses[0] == pytest.approx(0.4 * (before[2][1] - before[2][0]), rel=0.02)
    page.mouse(at(0.5, 0.5, ".legendtoggle"), pressed=True)
    shown = f"{drawn}._fullData.filter(curve => curve.visible !== true).map(curve => curve.name)"
    assert set(page.until(shown)) == {"short"}
    assert page.value("document.querySelectorAll('[data-title*=Share], a[href]').length") == 0
    page.open(runs / "x.html", width=390)
    assert page.value("document.documentElement.scrollWidth") == 390
    assert page.errors == [] and set(page.requests) == {address}


def test_without_plotly_the_page_says_how_to_get_it(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "plotly", None)
    words = ["plot", str(runs / "short"), "--output", str(runs / "x.png"), "--html", str(runs / "x.html")]
    assert main(words) == 2
    assert "--html: needs plotly; pip install 'swiftlite[html]'" in capsys.readouterr().err
