"""Reports: strict JSON, pages that keep hostile names as text, plots of the numbers themselves."""

from __future__ import annotations

import html
import io
import json
import math
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from PIL import Image
from torch import Tensor, nn

from helpers.html_page import LOADING, Page
from helpers.images import noise_images
from helpers.reports import AFTER, Tried, corner, looked, run
from nnprune_backdoor import CleanData, Purified, PurifyError
from nnprune_backdoor.core.measures import ProxySuccess
from nnprune_backdoor.core.scores import ChannelScores, Selection
from nnprune_backdoor.core.sites import Site
from nnprune_backdoor.errors import DataError
from nnprune_backdoor.reports import Report, plots
from nnprune_backdoor.reports.pages import escape_markdown, to_html, to_markdown
from nnprune_backdoor.reports.plain import plain
from nnprune_backdoor.reports.report import NOT_ASKED
from nnprune_backdoor.reports.sections import spans
from nnprune_backdoor.selectors import AccuracyBudget, BelowThreshold, LowestCount


@pytest.fixture(scope="module")
def purified(_trained: nn.Module, clean: CleanData) -> Purified:
    return run(_trained, clean, Tried())


@pytest.fixture(scope="module")
def plainest(_trained: nn.Module, clean: CleanData) -> Purified:
    """No labels, no curve, nothing silenced, nothing removed."""
    return run(_trained, [clean.images], LowestCount(0), removal="none")


# ---- data ---------------------------------------------------------------------------------------


def test_json_is_strict_and_comes_back(purified: Purified, plainest: Purified) -> None:
    for result in (purified, plainest):
        data = result.to_dict()
        assert json.loads(json.dumps(data, allow_nan=False)) == data


def test_what_is_not_plain_becomes_plain() -> None:
    @dataclass
    class Inner:
        x: float = -math.inf

    given = {
        1: math.nan,
        "t": torch.tensor([[1.5]]),
        "n": np.float32(0.5),
        "p": torch.zeros(3, 224, 224),
        "f": spans,
        "i": Inner(),
        "s": "a\ud800b",
        "c": complex(0, 1),
        "l": ({3}, True, None),
    }
    assert plain(given) == {
        "1": None,
        "t": [[1.5]],
        "n": 0.5,
        "p": "array of shape (3, 224, 224)",
        "f": "spans",
        "i": {"x": None},
        "s": "a?b",
        "c": "1j",
        "l": [[3], True, None],
    }


def test_the_numbers_are_those_of_the_run(purified: Purified, clean: CleanData) -> None:
    data = purified.to_dict()
    given, chosen, removal = data["given"], data["selection"], purified.removal
    assert removal is not None
    assert purified.accuracy is not None
    assert given["architecture"] == "test_resnet (ResNet)"
    assert (given["shape"], given["classes"], given["images"]) == ([3, 32, 32], 10, len(clean))
    assert given["labelled"] is True
    assert sum(given["parts"]) == len(clean)
    assert given["parameters"] == removal.before.parameters == data["size"]["before"]["parameters"]
    assert data["criterion"]["settings"] == {"strength": None, "stamp": "spans"}
    assert data["criterion"]["details"] == {"loss": None, "counts": [1, 2], "7": [None, True]}
    assert (chosen["selector"], chosen["neurons"]) == ("Tried", 9)
    assert [point["chosen"] for point in data["curve"]] == [False, False, True, False]
    assert data["accuracy"]["after"]["hits"] == purified.accuracy.after.hits
    assert data["accuracy"]["drop"] == purified.accuracy.drop
    assert data["seconds"] == purified.seconds
    assert {"torch", "python", "nnprune_backdoor"} <= data["versions"].keys()


def test_the_number_of_threads_is_on_record(
    _trained: nn.Module, clean: CleanData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums depend on it; reports that were written before have none, and can be read."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    result = run(_trained, clean, LowestCount(4))
    data = result.to_dict()
    assert data["given"].pop("threads", None) == 7
    assert "CPU threads" not in to_markdown(Report.from_dict(data))
    assert "CPU threads" in result.to_markdown()


def test_every_neuron_is_accounted_for_once(purified: Purified) -> None:
    assert purified.removal is not None
    removed, silenced = set(), {}
    for layer in purified.to_dict()["neurons"]:
        removed |= {(layer["layer"], channel) for channel in layer["removed"]}
        for part in layer["silenced"]:
            silenced |= {(layer["layer"], channel): part["why"] for channel in part["channels"]}
    assert removed == set(purified.removal.removed)
    assert silenced == purified.removal.silenced
    assert len(removed) + len(silenced) == len(purified.selection)
    assert removed
    assert silenced


def test_layers_have_their_own_scores(purified: Purified) -> None:
    layers = purified.to_dict()["layers"]
    assert [layer["layer"] for layer in layers] == [site.name for site in purified.scores.sites]
    for layer in layers:
        piece = purified.scores[layer["layer"]].double()
        wanted = (piece.min().item(), piece.quantile(0.5).item(), piece.max().item())
        assert (layer["lowest"], layer["median"], layer["highest"]) == pytest.approx(wanted)
    assert sum(layer["silenced"] for layer in layers) == 9
    assert purified.removal is not None
    assert sum(layer["removed"] for layer in layers) == len(purified.removal.removed)


class Pixel(nn.Module):
    """Label 1 where the first pixel is bright, else 0; or 0 whatever it sees."""

    def __init__(self, sees: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(float(sees)))

    def forward(self, x: Tensor) -> Tensor:
        bright = self.weight * x[:, 0, 0, 0]
        return torch.stack([torch.zeros_like(bright), bright], 1)


def test_proxy_success_is_counted_on_the_same_images() -> None:
    """Ten images, four dark: the trigger turns all four; the second model does not see it."""
    images = torch.ones(10, 3, 32, 32)
    images[:4] = -1
    clean = CleanData(images)
    sites = (Site("s", 1, "layer", "s"),)
    scores = ChannelScores(sites, torch.zeros(1), "none", triggers=(corner(1),))
    selection = Selection(sites, (), triggers=(corner(1), corner(1)))
    found = ProxySuccess.of(scores, selection, Pixel(), Pixel(sees=False), clean)
    assert [proxy.source for proxy in found] == ["criterion", "selector", "selector"]
    for proxy in found:
        assert (proxy.before.hits, proxy.before.count) == (4, 4)
        assert (proxy.after.hits, proxy.after.count) == (0, 4)
    assert "100.0% -> 0.0% of 4 images" in str(found[0])
    bright = CleanData(images[4:])  # all at the target already
    assert ProxySuccess.of(scores, selection, Pixel(), Pixel(), bright) == ()


def test_the_summary_names_proxy_success(purified: Purified, plainest: Purified) -> None:
    assert purified.summary().count("\nproxy ") == 2
    assert "ASR" not in purified.summary()


def test_the_repr_is_three_lines(purified: Purified, plainest: Purified) -> None:
    assert purified.removal is not None
    removed = len(purified.removal.removed)
    neurons, accuracy, seconds = repr(purified).splitlines()
    assert (
        neurons == f"9 of {len(purified.scores.flat)} neurons silenced, {removed} of them removed"
    )
    assert accuracy == f"accuracy {purified.accuracy}"
    assert seconds == f"{sum(purified.seconds.values()):.1f} seconds"
    assert repr(plainest).splitlines()[1] == "accuracy not measured"
    assert purified._repr_html_() == f"<pre>{html.escape(repr(purified))}</pre>"
    assert " -&gt; " in purified._repr_html_()


# ---- what people read ---------------------------------------------------------------------------


def tables(markdown: str) -> Iterator[list[list[str]]]:
    """Rows of cells of each table."""
    for block in re.findall(r"(?:^\|.*\n?)+", markdown, re.MULTILINE):
        yield [re.split(r"(?<!\\)\|", line.strip())[1:-1] for line in block.splitlines()]


def test_html_is_well_formed_and_loads_nothing(purified: Purified, plainest: Purified) -> None:
    for result, pictures in ((purified, 2 + 2 + 3 * 4), (plainest, 1 + 1 + 2 * 4)):
        page = Page(result.to_html())
        assert page.open == [], "every tag is closed"
        assert not {"script", "link", "iframe", "object", "base"} & {tag for tag, _ in page.tags}
        sources = [
            value for _, attributes in page.tags for name, value in attributes.items()
            if name in LOADING
        ]  # fmt: skip
        assert len(sources) == pictures
        assert all(source and source.startswith("data:image/png;base64,") for source in sources)
        assert not any(name.startswith("on") for _, found in page.tags for name in found)
        assert not re.search(r"url\(|@import", result.to_html(pictures=False))


def test_both_pages_say_what_matters(purified: Purified) -> None:
    page = "".join(Page(purified.to_html()).text)
    markdown = purified.to_markdown()
    assert purified.accuracy is not None
    for said in (
        "What this does not say",
        "no proof that no backdoor is left",
        f"{purified.accuracy.before.value:.1%} → {purified.accuracy.after.value:.1%}",
        "proxy success",
        f"of {len(purified.scores.flat):,}",
        "chosen",
        "nobody, nowhere",
    ):
        assert said in page
        assert said in markdown
    assert "because <nine> | is enough" in page
    assert "because &lt;nine&gt; \\| is enough" in markdown


def test_no_verdict_is_given(purified: Purified, plainest: Purified) -> None:
    verdict = re.compile(
        r"\b(ASR|safe|certified|(is|now|was) clean|no backdoor (in|found))\b", re.I
    )
    for result in (purified, plainest):
        for text in (result.to_html(pictures=False), result.to_markdown(), result.summary()):
            assert not verdict.search(text)


def test_markdown_tables_have_as_many_cells_in_every_row(
    purified: Purified, plainest: Purified
) -> None:
    for result in (purified, plainest):
        found = list(tables(result.to_markdown()))
        assert len(found) >= 7
        for head, rule, *rows in found:
            assert all(re.fullmatch("-{3}:?", cell) for cell in rule)
            assert {len(row) for row in (head, rule, *rows)} == {len(head)}
            assert rows


HOSTILE = (
    "\"'><script>alert(1)</script><img src=x onerror=y>|`\n# [a](http://e.example){{7-7}}&amp;"
)
FREE = {"settings", "details", "seconds", "versions"}  # whose keys are not ours


def poisoned(value: Any, free: bool = False) -> Any:
    """The same data with every string replaced, keys included where others name them."""
    if isinstance(value, dict):
        return {
            f"{HOSTILE}{key}" if free else key: poisoned(entry, free or key in FREE)
            for key, entry in value.items()
        }
    if isinstance(value, list):
        return [poisoned(entry, free) for entry in value]
    return HOSTILE if isinstance(value, str) else value


def test_hostile_strings_stay_text(purified: Purified) -> None:
    data = purified.to_dict()
    del data["format"]
    report, hostile = Report(**data), Report(**poisoned(data))
    page, attacked = Page(to_html(report, {})), Page(to_html(hostile, {}, HOSTILE))
    assert attacked.shape()[:-1] == page.shape(), "the note aside, no tag more and no attribute"
    text = "".join(attacked.text)
    assert text.count(HOSTILE) > 50
    markdown = to_markdown(hostile)
    assert "<" not in markdown
    assert "{{7-7}}" in markdown
    assert not re.search(r"(?<!\\)\[", markdown), "no link, no picture"
    assert not re.search(r"(?<!\\)`", markdown)
    wanted = [[len(row) for row in table] for table in tables(to_markdown(report))]
    assert [[len(row) for row in table] for table in tables(markdown)] == wanted


def test_a_model_with_hostile_names_is_reported_and_drawn() -> None:
    name = '"><script>alert(1)</script>$\\frac{|\u4e2d'
    layers = {name: nn.Conv2d(1, 6, 3), "relu": nn.ReLU(), "pool": nn.AdaptiveAvgPool2d(1)}
    model = type(name, (nn.Sequential,), {})()
    for key, layer in (*layers.items(), ("flat", nn.Flatten()), ("head", nn.Linear(6, 2))):
        model.add_module(key, layer)
    images = noise_images(40)[:, :1]
    result = run(model, CleanData(images, torch.arange(40) % 2), LowestCount(2))
    html = result.to_html()
    assert "<script" not in html
    assert name in "".join(Page(html).text)
    assert "<" not in result.to_markdown()


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("a|b\nc", "a\\|b c"),
        ("<b>&lt;", "&lt;b&gt;\\&lt;"),
        ("[x](y) *z* _w_ `v` ~u~ $t$", "\\[x\\](y) \\*z\\* \\_w\\_ \\`v\\` \\~u\\~ \\$t\\$"),
        ("\\|", "\\\\\\|"),
        ("score <= -3, a > b < 2", "score <= -3, a > b < 2"),  # comparisons are no markup
        ("a <= <b> x <i>", "a <= &lt;b&gt; x &lt;i&gt;"),
        ("> a", "&gt; a"),
        ("- > a 1) > b", "- &gt; a 1) &gt; b"),
        ("x <", "x &lt;"),
    ],
)
def test_markdown_is_escaped(text: str, written: str) -> None:
    assert escape_markdown(text) == written


def test_spans() -> None:
    assert spans([0, 3, 4, 5, 9, 10]) == "0, 3-5, 9-10"
    assert spans([]) == ""


# ---- less to report -----------------------------------------------------------------------------


def test_nothing_silenced_and_no_labels(plainest: Purified) -> None:
    data, page = plainest.to_dict(), "".join(Page(plainest.to_html(pictures=False)).text)
    assert data["accuracy"] is data["size"] is None
    assert data["neurons"] == data["curve"] == []
    assert data["given"]["labelled"] is False
    for said in ("Nothing was silenced", "not measured", "shape unchanged", "not asked for"):
        assert said in page
    assert "gives no evidence that it had none" in plainest.to_markdown()


def test_without_removal_every_neuron_is_silenced(_trained: nn.Module, clean: CleanData) -> None:
    result = run(_trained, clean, LowestCount(4), removal="none")
    data = result.to_dict()
    assert data["size"] is None
    assert {part["why"] for layer in data["neurons"] for part in layer["silenced"]} == {NOT_ASKED}
    assert "shape and speed are as before" in result.to_markdown()


def test_what_was_asked_for_limits_what_is_said(_trained: nn.Module, clean: CleanData) -> None:
    result = run(_trained, clean, LowestCount(9), removal="group")
    assert result.removal is not None
    said = " ".join(result.to_dict()["limits"])
    assert f"by {result.removal.drift:.1e} of their scale" in said
    endless = replace(result, removal=replace(result.removal, drift=math.inf), triggers=())
    data = endless.to_dict()
    json.dumps(data, allow_nan=False)
    assert data["size"]["drift"] is None
    assert "not finite of their scale" in endless.to_markdown()
    assert "no number here is about a backdoor" in endless.to_html(pictures=False)


# ---- plots --------------------------------------------------------------------------------------


def test_sizes_are_as_asked(purified: Purified) -> None:
    for plot in (purified.plot_scores, purified.plot_curve, purified.plot_triggers):
        figure = plot((5.0, 4.0))
        assert figure.get_size_inches().tolist() == [5.0, 4.0]
        file = io.BytesIO()
        figure.savefig(file, dpi=40)
        assert Image.open(file).size == (200, 160)


def test_every_score_is_drawn_and_the_silenced_ones_stand_out(purified: Purified) -> None:
    axis, counts = purified.plot_scores().axes
    drawn: dict[str, list[tuple[float, float]]] = {}
    for line in axis.lines:
        pairs = zip(line.get_ydata(), line.get_xdata(), strict=True)
        drawn.setdefault(line.get_color(), []).extend(pairs)
    sites = [site.name for site in purified.scores.sites]
    assert purified.removal is not None and purified.removal.removed
    for colour, neurons in (
        (plots.RED, purified.removal.removed),
        (plots.BLUE, set(purified.selection.neurons) - set(purified.removal.removed)),
    ):
        wanted = [(sites.index(n.site), purified.scores[n.site][n.channel].item()) for n in neurons]
        assert sorted(drawn[colour]) == sorted(wanted)
        bars = [bar for bar in counts.patches if to_hex(bar.get_facecolor()) == colour]
        assert sum(bar.get_width() for bar in bars) == len(neurons)
    values = sorted(value for pairs in drawn.values() for _, value in pairs)
    assert values == purified.scores.flat.sort().values.tolist()
    assert sum(bar.get_width() for bar in counts.patches) == len(values)
    assert [label.get_text() for label in axis.get_yticklabels()] == sites


def test_the_curve_shows_drop_success_and_the_choice(purified: Purified) -> None:
    drop, success = purified.plot_curve().axes
    assert drop.lines[0].get_xdata().tolist() == [0, 3, 9, 20]
    assert drop.lines[0].get_ydata().tolist() == pytest.approx([0, -1, 1.5, 20])
    assert success.lines[0].get_ydata().tolist() == pytest.approx([99, 50, 4, 0])
    assert purified.accuracy is not None
    end = [(x, y) for x, y in zip(*drop.lines[1].get_data(), strict=True)]
    assert end == [(9, pytest.approx(100 * purified.accuracy.drop))]
    assert list(drop.lines[2].get_xdata()) == list(success.lines[1].get_xdata()) == [9, 9]
    assert "proxy success" in success.get_ylabel()


def test_the_curve_of_an_accuracy_budget(_trained: nn.Module, clean: CleanData) -> None:
    result = run(_trained, clean, AccuracyBudget(max_drop=0.07, points=5), removal="none")
    (axis,) = result.plot_curve().axes
    assert axis.lines[0].get_xdata().tolist() == [point.neurons for point in result.selection.curve]
    assert list(axis.lines[3].get_ydata()) == pytest.approx([7, 7])
    assert sum(point["chosen"] for point in result.to_dict()["curve"]) == 1


def test_triggers_are_shown_on_a_clean_image(purified: Purified, clean: CleanData) -> None:
    axes = purified.plot_triggers().axes
    assert len(axes) == 8
    image, mask, pattern, stamped = (axis.images[0].get_array() for axis in axes[4:])
    low, high = clean.images.amin((0, 2, 3)).numpy(), clean.images.amax((0, 2, 3)).numpy()
    unit = (clean.images[0].permute(1, 2, 0).numpy() - low) / (high - low)
    np.testing.assert_allclose(image, unit, atol=1e-6)
    assert mask.sum() == 9
    bright = np.clip((2.0 - low) / (high - low), 0, 1)
    np.testing.assert_allclose(stamped[0, 0], bright, atol=1e-6)
    np.testing.assert_allclose(pattern[0, 0], bright, atol=1e-6)
    np.testing.assert_allclose(stamped[10:, 10:], unit[10:, 10:], atol=1e-6)
    assert pattern[10:].max() == 0
    assert "label 1" in axes[7].get_title()


def test_evidence_before_and_after_says_what_it_speaks_for(purified: Purified) -> None:
    found = looked(purified, True, AFTER)
    markdown = found.to_markdown()
    assert "Evidence of a backdoor with target 1 (probability 0.9" in markdown
    assert "no evidence of these kinds is left (probability 0.25)." in markdown
    assert "| 0.75 | for (+1.0) | 0.125 |" in markdown
    assert "| 0.95 | for (+1.4) | - |" in markdown
    for probability, said in ((0.9, "evidence remains"), (0.5, "undecided whether evidence")):
        look = {**AFTER, "alarm": probability > 0.7, "probability": probability}
        assert f"In the purified model: {said}" in looked(purified, True, look).to_markdown()
    none = looked(purified, False, None).to_markdown()
    assert "against (-1.8) |" in none
    assert "In the purified model" not in none
    read = Report.from_dict(json.loads(json.dumps(found.to_dict())))
    assert to_markdown(read) == markdown, "the same from the file"


def test_evidence_is_drawn_on_its_side(purified: Purified) -> None:
    (axis,) = looked(purified, True, AFTER).plot_evidence().axes
    drawn = {line.get_marker(): float(np.atleast_1d(line.get_xdata())[0]) for line in axis.lines}
    assert drawn["o"] == pytest.approx(16.2 * (0.95 - 0.864))  # the last drawn, on top: universal
    assert drawn["X"] == pytest.approx(3.8 * (0.125 - 0.48))


def test_what_is_not_there_cannot_be_plotted(plainest: Purified) -> None:
    with pytest.raises(DataError, match="no evidence to show"):
        plainest.plot_evidence()
    with pytest.raises(DataError, match="does not try several amounts"):
        plainest.plot_curve()
    with pytest.raises(DataError, match="recovered one"):
        replace(plainest, triggers=()).plot_triggers()


def test_without_matplotlib(purified: Purified, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for plot in (purified.plot_scores, purified.plot_curve, purified.plot_triggers):
        with pytest.raises(PurifyError, match=r"pip install 'nnprune-backdoor\[plots\]'"):
            plot()
    page = Page(purified.to_html())
    assert 'class="plot"' not in purified.to_html()
    assert sum(tag == "img" for tag, _ in page.tags) == 14, "small ones are no plots"
    assert "No pictures: plots need matplotlib" in "".join(page.text)


def test_many_layers_are_drawn_within_bounds() -> None:
    """Two hundred layers: the picture stops growing and names some of them only."""
    sites = tuple(Site(f"layer{i}", 2, "layer", f"layer{i}") for i in range(200))
    scores = ChannelScores(sites, torch.rand(400, generator=torch.Generator()), "none")
    given = {"scores": scores, "selection": BelowThreshold(0.1)(scores), "removal": None}
    record: Any = type("Some", (), given)
    figure = plots.scores(record)
    assert figure.get_size_inches()[1] == 20
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels[0] == "layer0"
    assert 50 <= len(labels) <= 100
