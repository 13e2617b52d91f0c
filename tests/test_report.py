"""The report: self-contained, escaped, complete; its sentences say no more than was measured."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import synthetic
from bitplan import report
from bitplan.artifacts import Evaluation, Plan, Sensitivity
from bitplan.budget import human
from bitplan.errors import ArtifactError
from bitplan.plan import make
from bitplan.reporting import charts, findings, heatmaps, scales, verdict, wording
from bitplan.rules import Rules, Share

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>|`*$x^`\u202e"


@pytest.fixture(scope="module")
def table() -> Sensitivity:
    return synthetic.sensitivity()


@pytest.fixture(scope="module")
def plan(table: Sensitivity) -> Plan:
    return synthetic.made(table)


@pytest.fixture(scope="module")
def evaluation(plan: Plan) -> Evaluation:
    return synthetic.evaluation(plan)


@pytest.fixture(scope="module")
def folder(
    table: Sensitivity, plan: Plan, evaluation: Evaluation, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder as `auto` leaves it, with its report."""
    path = tmp_path_factory.mktemp("run")
    for part in (table, plan, evaluation, synthetic.quantized(plan)):
        part.save(path / f"{part.kind}.json")
    written = report.write_from(path)
    assert all(p.is_file() for p in written)
    assert not list(path.rglob("*.partial"))
    return path


class Page(HTMLParser):
    """Tags with their attributes, and the text outside scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.scripts, self._inside = "", [""], ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside != "style":
            self.text += data


def test_the_page_needs_no_network(folder: Path) -> None:
    page = Page((folder / "report.html").read_text())
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base")
        for name in ("src", "href", "action", "poster", "srcset"):
            assert (attributes.get(name) or "#").startswith("#"), (tag, attributes)
    text = (folder / "report.html").read_text()
    styles = "".join(re.findall(r"<style>(.*?)</style>", text, re.S))
    assert "@import" not in styles
    assert "url(" not in styles
    policy = next(a for t, a in page.tags if t == "meta" and "http-equiv" in a)["content"]
    assert policy
    assert policy.startswith("default-src 'none'")


def test_every_script_has_the_nonce(folder: Path) -> None:
    page = Page((folder / "report.html").read_text())
    nonces = {a.get("nonce") for t, a in page.tags if t == "script"}
    assert len(nonces) == 1
    assert None not in nonces
    assert any("plotly.js v" in script for script in page.scripts)


def test_the_numbers_are_on_the_page(folder: Path) -> None:
    text = Page((folder / "report.html").read_text()).text
    for number in ("4.65 MB instead of 21.1 MB", "47 % less lost", "0.00770", "0.0146", "95.6 %",
                   "170 of 765", "8,123", "3.55", "4,649,984 bytes"):  # fmt: skip
        assert number in text, number
    for name in (*synthetic.PRESETS, "blk.11.ffn_down", "pinned by token_embd=q6_k", "12" * 32):
        assert name in text, name


def test_markdown_and_json_say_the_same(folder: Path) -> None:
    text = (folder / "report.md").read_text()
    assert "4.65 MB instead of 21.1 MB; KL 0.00770 nats/token" in text
    named = re.findall(r"\(figures/(.*?)\)", text)
    assert sorted(named) == ["bits.png", "frontier.png", "sensitivity.png", "spend.png"]
    assert all((folder / "figures" / name).is_file() for name in named)
    tables = re.findall(r"(?:^\|.*\n)+", text, re.M)
    assert len(tables) == 5
    for lines in (t.splitlines() for t in tables):
        assert len({line.replace(r"\|", "").count("|") for line in lines}) == 1
    data = json.loads((folder / "report.json").read_text())
    assert data["headline"] in text
    assert data["measured"]["plan"]["kl"] == {"value": 0.0077, "stderr": pytest.approx(3.14e-4)}
    assert data["plan"]["bytes"] == 4_649_984


def test_figures_are_valid(folder: Path) -> None:
    from PIL import Image

    for name in ("frontier", "bits", "sensitivity", "spend"):
        with Image.open(folder / "figures" / f"{name}.png") as image:
            image.verify()
            assert image.format == "PNG"
            assert image.width > 600
        svg = (folder / "figures" / f"{name}.svg").read_text()
        assert svg.startswith("<?xml")
        assert "<dc:date>" not in svg


def test_the_same_facts_give_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    for path in folder.glob("*.json"):
        if path.name != "report.json":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    for path in report.write_from(tmp_path):
        assert path.read_bytes() == (folder / path.relative_to(tmp_path)).read_bytes(), path.name


def test_charts_are_valid_plotly(table: Sensitivity, plan: Plan, evaluation: Evaluation) -> None:
    from plotly.graph_objects import Figure

    drawn = charts.all_of(findings.gather(table, plan, evaluation, None))
    assert set(drawn) == {"frontier", "bits", "sensitivity", "spend"}
    for figure in drawn.values():
        assert Figure(figure).data
        json.dumps(figure, allow_nan=False)
    shown = [t["name"] for t in drawn["sensitivity"]["data"] if t["visible"]]
    assert shown == ["q3_k"]


@pytest.mark.parametrize(
    "kept", [{"table"}, {"plan"}, {"evaluation"}, {"table", "plan"}, {"plan", "evaluation"}]
)
def test_missing_parts_still_give_a_report(
    kept: set[str], table: Sensitivity, plan: Plan, evaluation: Evaluation, tmp_path: Path
) -> None:
    written = report.write(
        tmp_path,
        sensitivity=table if "table" in kept else None,
        plan=plan if "plan" in kept else None,
        evaluation=evaluation if "evaluation" in kept else None,
    )
    names = {p.name for p in written}
    assert {"report.html", "report.md", "report.json"} <= names
    assert ("frontier.png" in names) == ("plan" in kept)
    assert ("spend.png" in names) == ({"table", "plan"} <= kept)
    page = Page((tmp_path / "report.html").read_text())
    drawn = {a["data-chart"] for _, a in page.tags if "data-chart" in a}
    assert drawn == {p.stem for p in written if p.suffix == ".png"}


def test_an_empty_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"holds no sensitivity\.json"):
        report.write_from(tmp_path)
    with pytest.raises(ArtifactError, match="there is no sensitivity"):
        report.write(tmp_path, sensitivity=None, plan=None, evaluation=None)


def test_parts_of_different_runs_are_an_error(
    table: Sensitivity, plan: Plan, evaluation: Evaluation, tmp_path: Path
) -> None:
    other = plan.model_copy(update={"bytes": plan.bytes - 32})
    with pytest.raises(ArtifactError, match="was made from another plan"):
        report.write(tmp_path, sensitivity=table, plan=other, evaluation=evaluation)
    assert not list(tmp_path.iterdir())


def test_hostile_names_stay_text(
    table: Sensitivity, plan: Plan, evaluation: Evaluation, tmp_path: Path
) -> None:
    bad = evil(table, plan, evaluation)
    report.write(tmp_path, **bad)
    text = (tmp_path / "report.html").read_text()
    honest = Page(text)
    assert "<script>alert" not in text
    assert "<img" not in text.replace("<image", "")
    assert all(t != "img" for t, _ in honest.tags)
    assert "<script>alert(1)</script>" in honest.text
    assert len([t for t, _ in honest.tags if t == "script"]) == 3
    figures = next(s for s in honest.scripts if '"frontier"' in s)
    assert "<" not in figures
    assert "alert(1)" in figures
    for hover in re.findall(r'"hovertext": ?\[(.*?)\]', json.dumps(json.loads(figures))):
        assert "<script" not in hover
        assert "<img" not in hover
    markdown = (tmp_path / "report.md").read_text()
    assert "<script" not in markdown
    assert "<img" not in markdown
    assert "\u202e" not in markdown


def evil(table: Sensitivity, plan: Plan, evaluation: Evaluation) -> dict[str, Any]:
    """The same artefacts with every name replaced by one that would like to be code."""
    model = table.model.model_copy(update={"name": HOSTILE, "architecture": HOSTILE})
    role = {"attn_q": f"attn_q{HOSTILE}"}
    units = [u.model_copy(update={"role": role.get(u.role, u.role)}) for u in table.units]
    reasons = dict.fromkeys(plan.reasons, HOSTILE)
    text = evaluation.text.model_copy(update={"source": HOSTILE})
    first, second, *others = evaluation.candidates
    candidates = [first, second.model_copy(update={"name": HOSTILE}), *others]
    odd = table.model_copy(update={"model": model, "units": units, "damage_unit": HOSTILE})
    parents = {"model": "ab" * 32}
    return {
        "sensitivity": odd,
        "plan": plan.model_copy(
            update={
                "model": model,
                "reasons": reasons,
                "origin": plan.origin.model_copy(update={"parents": parents}),
            }
        ),
        "evaluation": evaluation.model_copy(
            update={
                "model": model,
                "text": text,
                "candidates": candidates,
                "origin": evaluation.origin.model_copy(update={"parents": parents}),
            }
        ),
    }


def test_infinities_do_not_break_the_page(
    table: Sensitivity, plan: Plan, evaluation: Evaluation, tmp_path: Path
) -> None:
    first, second, *others = evaluation.candidates
    broken = [
        m.model_copy(update={"value": float("inf"), "stderr": float("nan")})
        for m in second.measurements
    ]
    second = second.model_copy(update={"measurements": broken})
    changed = evaluation.model_copy(update={"candidates": [first, second, *others]})
    report.write(tmp_path, sensitivity=table, plan=plan, evaluation=changed)
    text = (tmp_path / "report.html").read_text()
    assert "∞" in text
    json.loads(re.findall(r'id="figures">(.*?)</script>', text)[0], parse_constant=pytest.fail)


def test_a_difference_within_its_error_is_none(plan: Plan) -> None:
    close = verdict.of(synthetic.evaluation(plan, difference=0.0002), plan, None)
    assert "no difference measured against Q3_K_M at the same size" in close.headline
    assert "less lost" not in close.headline
    assert "within two standard errors" in close.why


def test_a_preset_that_measured_better_is_named(plan: Plan) -> None:
    won = synthetic.evaluation(plan, difference=-0.003, shipped="Q3_K_M")
    told = verdict.of(won, plan, None)
    assert (told.shipped, told.rival) == ("Q3_K_M", "plan")
    assert told.headline.startswith("4.63 MB instead of")
    assert "0.00770 for the plan at the same size: 39 % less lost" in told.headline
    assert told.why.startswith("Q3_K_M was shipped")
    against = {row.name: row.against for row in verdict.quality(won).rows}
    assert against["plan"].startswith("+0.00300")


def test_a_larger_candidate_is_no_rival(plan: Plan, evaluation: Evaluation) -> None:
    huge = synthetic.candidate("Q8_0", 11_000_000, 1e-5, plan.model.weights, "swap")
    wider = evaluation.model_copy(update={"candidates": [*evaluation.candidates, huge]})
    assert verdict.of(wider, plan, None).rival == "Q3_K_M"


def test_other_budgets_change_units(table: Sensitivity, plan: Plan) -> None:
    found = findings.alternatives(table, plan)
    assert [round(a.share, 2) for a in found] == [0.88, 0.9, 0.95, 1.05, 1.1, 1.25]
    damages = [a.damage for a in found]
    assert damages == sorted(damages, reverse=True)
    assert all(a.downs and not a.ups for a in found[:3])
    assert not any("token_embd" in a.up for a in found)


def test_other_budgets_that_break_a_share_are_left_out(table: Sensitivity) -> None:
    obeyed = Rules(shares=(Share(("token_embd",), least=1.5, name="embedding"),))
    chosen = make(table, synthetic.budget(), obeyed)
    found = [round(a.share, 2) for a in findings.alternatives(table, chosen)]
    assert found == [0.9, 0.95, 1.05, 1.1, 1.25]  # without the rule 0.8 can be had too


def test_a_profile_is_named(table: Sensitivity, tmp_path: Path) -> None:
    chosen = make(table, synthetic.budget(), Rules(profile="attention-high"))
    table.save(tmp_path / "sensitivity.json")
    chosen.save(tmp_path / "plan.json")
    report.write_from(tmp_path)
    assert "attention-high" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "by the profile attention-high" in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_bytes_spent_are_all_bytes(table: Sensitivity, plan: Plan) -> None:
    facts = findings.gather(table, plan, None, None)
    assert sum(sum(parts.values()) for parts in facts.spend.values()) == plan.bytes
    assert sum(m.units for m in facts.mix) == len(table.units)


def test_labels_do_not_overlap() -> None:
    spots = [scales.Spot(1 + i / 100, 0.1, f"name {i}") for i in range(30)]
    places = scales.place(spots, [(1.0, 0.05), (2.0, 0.01)], (0.9, 2.0), (0.001, 1.0))
    assert 0 < sum(p != "" for p in places) < len(spots)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0077, "0.00770"), (12.34, "12.3"), (0.9996, "1.00"), (1234.5, "1,234"), (0, "0"),
     (8.1e-5, "8.10e-5"), (-0.5, "-0.500"), (float("nan"), "unknown"), (99.97, "100")],
)  # fmt: skip
def test_significant_digits(value: float, text: str) -> None:
    assert wording.sig(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(999, "999 B"), (3_420_000, "3.42 MB"), (999_700, "1.00 MB"), (4e9, "4.00 GB"), (0, "0 B")],
)
def test_amounts(value: float, text: str) -> None:
    assert human(value) == text


def test_errors_decide_the_digits() -> None:
    assert wording.with_error(0.0077, 0.00012) == "0.00770 ± 0.00012"
    assert wording.with_error(6.3214, 0.0812) == "6.321 ± 0.081"
    assert wording.with_error(0.0077, None) == "0.00770"
    assert wording.ranges([3, 1, 2, 7, 9, 10]) == "1–3, 7, 9–10"


def test_common_format_is_the_measured_one(table: Sensitivity) -> None:
    assert heatmaps.common_format(table) == "q3_k"
