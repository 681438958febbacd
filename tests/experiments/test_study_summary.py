"""Statistics, tables and plots of a study from reports with known figures."""

import io
import json

import numpy as np
import pytest
from matplotlib.image import imread

import experiments.tables
from experiments.study import plots, summary, sweep, tables
from experiments.study.rows import ROWS, Row
from lt_adv.evaluation.plots import png
from tests.experiments.fake_runs import COUNTS, report

PUBLISHED = {"at": "clean 58.25, PGD-20 27.28", "robal": "clean 72.73"}
WORST_AND_PGD = ("Worst case", "PGD-20")
ADJUSTED = {"at_shifted": Row("AT, shifted", "posthoc", base="at", evaluates=True)}


def run(seed, seconds=60.0, **figures):
    return {"report": report(seed, **figures), "seed": seed, "training_seconds": seconds, "commit": "0123456789ab"}


@pytest.fixture
def results(monkeypatch):
    for name, row in ADJUSTED.items():
        monkeypatch.setitem(ROWS, name, row)
    return {
        "at": [run(0, 60.0), run(1, 70.0)],
        "robal": [run(2, right=0.9, robust=0.6)],
        "at_shifted": [run(3, right=0.7)],
    }


@pytest.fixture
def made(results):
    sweeps = {name: [run(0, swept=True)] for name in ("at", "robal")}
    return {"study": "s", **summary.summarise(results, PUBLISHED, {"cdt-seed0-full": "no such thing"}, scales=sweeps)}


def test_autoattack_on_fewer_images_has_a_column_and_a_sentence(results):
    smaller = run(0, robust=0.4)
    smaller["report"]["header"]["images"] = 12
    metrics = smaller["report"]["metrics"]
    metrics |= {"eval/autoattack/accuracy": 0.25, "eval/autoattack/accuracy_tail": 0.125, "eval/worst/accuracy": 0.2}
    made = summary.summarise(results, PUBLISHED, {}, autoattack={"at": [smaller]})
    figures = made["rows"]["at"]["figures"]
    assert figures["eval/autoattack/accuracy"]["values"] == [0.25]
    assert figures["eval/worst/accuracy"]["values"] != [0.2], "on all images"
    assert "eval/autoattack/accuracy" not in made["rows"]["robal"]["figures"]
    head, rows = tables.all_images(made)
    assert [row[head.index("AutoAttack")] for row in rows] == ["25.0", "", ""]
    assert "AutoAttack on 12 of them, one seed;" in tables.sentence(made)
    made = summary.summarise(results, PUBLISHED, {}, autoattack={"at": [smaller] * 2, "robal": [smaller]})
    assert "AutoAttack on 12 of them, 2 seeds;" in tables.sentence(made)


def test_mean_and_deviation_of_a_sample():
    assert summary.spread([0.4, 0.5, 0.75]) == {
        "mean": pytest.approx(0.55),
        "deviation": pytest.approx(np.std([0.4, 0.5, 0.75], ddof=1)),
        "values": [0.4, 0.5, 0.75],
    }
    assert summary.spread([0.4])["deviation"] is None
    result = summary.figures([{"a": 0.25, "b": None, "c": 1.0}, {"a": 0.75, "b": 0.5}])
    assert set(result) == {"a"}, "a mean over fewer seeds would not be that of the row"
    assert (result["a"]["mean"], result["a"]["deviation"]) == (0.5, pytest.approx(0.125**0.5))


def test_summary_is_json_and_complete(made, results):
    assert json.loads(json.dumps(made, allow_nan=False)) == made
    at = made["rows"]["at"]
    for metric in ("eval/worst/accuracy_tail", "eval/clean/balanced_accuracy", "eval/boundary_error_head"):
        values = [run["report"]["metrics"][metric] for run in results["at"]]
        assert at["figures"][metric]["values"] == values
        assert at["figures"][metric]["mean"] == pytest.approx(sum(values) / 2)
    assert at["seeds"] == [0, 1] and at["training_seconds"]["mean"] == 65 and at["commits"] == ["0123456789ab"]
    assert [c["class_count"] for c in at["classes"]] == list(COUNTS)
    accuracies = [run["report"]["classes"][3]["accuracy"]["worst"] for run in results["at"]]
    assert at["classes"][3]["accuracy"]["worst"] == pytest.approx(sum(accuracies) / 2)
    assert [scale for scale, _ in at["scales"]] == list(sweep.SCALES) and made["rows"]["at_shifted"]["scales"] == []
    assert at["scales"][-1][1] == run(0, swept=True)["report"]["metrics"]["eval/scale_100/accuracy"]
    assert at["published"] == PUBLISHED["at"] and made["rows"]["at_shifted"]["published"] == ""
    assert made["rows"]["at_shifted"]["evaluates"] == "at" and at["evaluates"] is None


def test_common_facts_of_the_rows(results):
    result = summary.common_facts(results)
    assert (result["epochs"], result["network"], result["eps"], result["different"]) == (3, "WRN-10-1", 0.1, [])
    results["robal"][0]["report"]["header"]["epochs"] = 80
    assert summary.common_facts(results) == {**result, "different": ["epochs"]}
    assert "Not the same for all rows: epochs." in tables.sentence({"about": summary.common_facts(results)})
    assert tables.sentence({"about": summary.common_facts({})}) == "No row has a result."


def cells(head, row):
    return dict(zip(head, row, strict=True))


def test_main_table(made, results):
    head, rows = tables.all_images(made)
    assert head[:7] == ["All images", "Clean", "FGSM", "PGD-20", "CW-20", "LSA", "Worst case"]
    at, robal, shifted = (cells(head, row) for row in rows)
    first, second = (run["report"]["metrics"]["eval/clean/accuracy"] for run in results["at"])
    assert first != second
    assert at["Clean"] == f"{50 * (first + second):.1f} ± {100 * abs(first - second) / 2**0.5:.1f}"
    assert at["Seeds"] == "2" and at["Training in s"] == "65 ± 7"
    assert "±" not in robal["Clean"] and robal["Training in s"] == "60"
    assert at["Published (source: the config)"] == PUBLISHED["at"]
    assert shifted["Published (source: the config)"] == "–" and shifted["All images"] == "AT, shifted"
    assert tables.all_images(made, published=False) == (head[:-1], [row[:-1] for row in rows])


def test_condition_of_one_row_is_a_column(made):
    for condition in ("autoattack", "ead", "pgd100", "mim20"):
        made["rows"]["robal"]["figures"][f"eval/{condition}/accuracy"] = summary.spread([0.125])
    head, rows = tables.all_images(made)
    shown = ["Clean", "FGSM", "PGD-20", "PGD-100", "MIM-20", "CW-20", "LSA", "AutoAttack", "EAD", "Worst case"]
    assert head[1:11] == shown
    for name in ("PGD-100", "MIM-20", "AutoAttack", "EAD"):
        assert cells(head, rows[1])[name] == "12.5" and cells(head, rows[0])[name] == ""


def test_tables_of_groups_of_classes(made):
    result = {head[0]: (head, rows) for head, rows in tables.slices(made)}
    assert list(result) == ["Balanced: mean over classes", "Head", "Body", "Tail"]
    head, rows = result["Tail"]
    assert head == ["Tail", "Clean", "FGSM", "PGD-20", "CW-20", "LSA", "Worst case"]
    tail = made["rows"]["robal"]["figures"]["eval/pgd20/accuracy_tail"]["mean"]
    assert cells(head, rows[1])["PGD-20"] == f"{100 * tail:.1f}"
    for row in made["rows"].values():  # a definition of groups that has no body
        row["figures"] = {name: it for name, it in row["figures"].items() if not name.endswith("_body")}
    assert [head[0] for head, _ in tables.slices(made)] == ["Balanced: mean over classes", "Head", "Tail"]
    assert tables.groups(made)[0] == ["By group", *(f"{c}, {g}" for c in WORST_AND_PGD for g in ("head", "tail"))]


def test_plots_show_every_row(made):
    drawn = plots.draw(made)
    assert set(drawn) == {"robustness", "classes", "errors", "logit_scale"}
    for name, figure in drawn.items():
        picture = imread(io.BytesIO(png(figure)))
        assert min(picture.shape[:2]) > 200 and picture[..., :3].std() > 0.01, name
    titles = [row["title"] for row in made["rows"].values()]
    for axes in drawn["robustness"].axes:
        assert sorted(text.get_text() for text in axes.texts) == sorted(titles)
        assert len(axes.containers) == 3
    assert [axes.get_title("left") for axes in drawn["classes"].axes] == titles
    assert [axes.get_title("left") for axes in drawn["logit_scale"].axes][:2] == titles[:2]
    assert [label.get_text() for label in drawn["errors"].axes[0].get_yticklabels()] == titles


def test_plots_show_the_figures(made):
    drawn = plots.draw(made)
    robal = made["rows"]["robal"]["figures"]
    overall, tail = drawn["robustness"].axes
    for axes, suffix in ((overall, ""), (tail, "_tail")):
        (x,), (y,) = axes.containers[1].lines[0].get_data()
        assert x == 100 * robal[f"eval/clean/accuracy{suffix}"]["mean"]
        assert y == 100 * robal[f"eval/worst/accuracy{suffix}"]["mean"]
    natural, boundary = (bars[0].get_width() for bars in drawn["errors"].axes[3].containers[2:4])  # 2nd row, tail
    assert natural == pytest.approx(100 * robal["eval/natural_error_tail"]["mean"])
    assert natural + boundary == pytest.approx(100 * robal["eval/robust_error_tail"]["mean"])
    x, y = drawn["logit_scale"].axes[1].lines[1].get_data()
    assert list(x) == list(sweep.SCALES) and y[2] == 100 * made["rows"]["robal"]["scales"][2][1]
    worst = drawn["classes"].axes[1].lines[3].get_ydata()
    assert worst[-1] == 100 * made["rows"]["robal"]["classes"][-1]["accuracy"]["worst"]


def test_without_a_sweep_there_is_no_plot_of_it(results):
    assert "logit_scale" not in plots.draw(summary.summarise(results, {}, {}))


def test_labels_do_not_cover_each_other():
    """Twenty-five rows close together."""
    rng = np.random.default_rng(0)
    rows = {}
    for i in range(25):
        x, y = 40 + 3 * rng.standard_normal(), 20 + 2 * rng.standard_normal()
        figures = {f"eval/{c}/accuracy": summary.spread([v / 100]) for c, v in (("clean", x), ("worst", y))}
        rows[f"r{i}"] = {"title": f"A method {i}", "figures": figures, "evaluates": None, "scales": []}
    (axes,) = plots.robustness(rows).axes
    for text in axes.texts:
        text.arrow_patch = None  # the extent excludes the line
    boxes = [text.get_window_extent() for text in axes.texts]
    assert len(boxes) == 25
    covered = sum(plots._overlap(a, b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert covered < 0.02 * sum(box.width * box.height for box in boxes)


def test_panels_in_several_lines(made):
    rows = {f"r{i}": {**made["rows"]["at"], "title": f"Method {i}"} for i in range(7)}
    for draw, labels in ((plots.classes, 0), (plots.scales, 4)):
        axes = draw(rows).axes
        assert [it.get_title("left") for it in axes[:7]] == [f"Method {i}" for i in range(7)] and len(axes) == 10
        assert [len(it.get_xticklabels()) for it in axes[:7]] == [0, 0, *[labels] * 5], (
            "only the last panel of a column has labels"
        )


def test_plot_of_many_classes():
    rows = {"at": [run(0, classes=100)], "robal": [run(1, classes=100)]}
    figure = plots.draw(summary.summarise(rows, {}, {}))["classes"]
    assert len(figure.axes[0].lines[0].get_xdata()) == 100 and len(png(figure)) > 10_000


def write(folder, made):
    """Writes the summary of a study to its folder."""
    folder.mkdir(exist_ok=True)
    (folder / "table.json").write_text(json.dumps(made))


def test_documentation_has_the_studies(made, tmp_path):
    assert "not measured yet" in experiments.tables.study(tmp_path)
    (tmp_path / "s" / "plots").mkdir(parents=True)
    (tmp_path / "s" / "plots" / "robustness.png").touch()
    write(tmp_path / "s", made)
    write(tmp_path / "ablation", {**made, "study": "ablation"})
    write(tmp_path / "precision", {**made, "study": "precision"})
    text = experiments.tables.study(tmp_path)
    assert text.startswith("**s.** Digits-LT, exponential profile; WRN-10-1, 3 epochs, eps 0.1")
    assert "**a" not in text and "**p" not in text
    assert "| cdt-seed0-full | no such thing |" in text
    assert "(experiments/results/s/plots/robustness.png)" in text and "plots/errors.png" not in text
    first, second = (it for it in text.split("\n\n") if "| RoBal-N |" in it)
    assert first.startswith("| All images | Clean |") and second.startswith("| By group | Worst case, head |")
    assert "Published" not in text and PUBLISHED["robal"] not in text


def test_front_page_has_the_first_study_with_all_its_rows(made, tmp_path, monkeypatch):
    monkeypatch.setattr(experiments.tables, "HEADLINE", ("at", "robal"))
    assert "not measured yet" in experiments.tables.headline(tmp_path)
    write(tmp_path / "cpu", made)
    text, table = experiments.tables.headline(tmp_path).split("\n\n")
    assert text.startswith("Digits-LT") and text.endswith("The worst case is over FGSM, PGD-20, CW-20 and LSA.")
    head, _, *body = ([cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines())
    assert head == ["", "Clean", "PGD-20", "Worst case", "Worst case, head", "Worst case, tail"]
    assert [row[0] for row in body] == ["AT", "RoBal-N"]
    write(tmp_path / "comparison", {**made, "rows": {"at": made["rows"]["at"]}})
    assert experiments.tables.headline(tmp_path).startswith("Digits-LT"), "a row is missing in the other"
    write(tmp_path / "comparison", {**made, "about": {**made["about"], "dataset": "Other"}})
    assert experiments.tables.headline(tmp_path).startswith("Other")


def test_documentation_has_the_ablations(made, tmp_path):
    assert "--preset=ablation --config.data.path=<folder of images>` measures it" in experiments.tables.ablation(
        tmp_path
    )
    rows = made["rows"]
    rows["at_twice"] = {**rows["at"], "title": "AT, twice", "varies": "at"}
    write(tmp_path / "ablation", made)
    write(tmp_path / "ablation_2", made)
    text, table = experiments.tables.ablation(tmp_path).split("\n\n")[:2]
    assert text.startswith("**ablation.** Digits-LT, exponential profile; WRN-10-1, 3 epochs")
    assert "\n\n**ablation_2.** Digits-LT" in experiments.tables.ablation(
        tmp_path
    ) and "measured yet" in experiments.tables.study(tmp_path)
    head, _, *body = ([cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines())
    overall, tail = ["Clean", "PGD-20", "CW-20", "Worst case"], ["PGD-20, tail", "CW-20, tail", "Worst case, tail"]
    assert head == ["Row", *overall, *tail]
    assert [row[0] for row in body] == ["AT", "AT, twice", "AT, shifted", "RoBal-N"]
    metrics = [f"{c}/accuracy" for c in ("clean", "pgd20", "cw20", "worst")]
    metrics += [f"{c}/accuracy_tail" for c in ("pgd20", "cw20", "worst")]
    assert body[3][1:] == [f"{100 * rows['robal']['figures'][f'eval/{m}']['mean']:.1f}" for m in metrics]


def test_documentation_has_the_precisions(made, tmp_path):
    assert "--preset=precision --scales=none` measures it" in experiments.tables.precision(tmp_path)
    write(tmp_path / "precision", made)
    text, table = experiments.tables.precision(tmp_path).split("\n\n")
    assert text.startswith("Digits-LT, exponential profile; WRN-10-1, 3 epochs")
    assert table.startswith("| Precision | Seeds | Clean, balanced | PGD-20, balanced | PGD-20, tail |")
    assert [line.split(" | ")[:2] for line in table.splitlines()[2:]] == [
        ["| AT", "2"], ["| RoBal-N", "1"], ["| AT, shifted", "1"],
    ]  # fmt: skip


def test_summary_names_the_varied_row(monkeypatch):
    monkeypatch.setitem(ROWS, "at_twice", Row("AT, twice", "at", varies="at"))
    rows = summary.summarise({"at": [run(0)], "at_twice": [run(1)]}, {}, {})["rows"]
    assert (rows["at"]["varies"], rows["at_twice"]["varies"]) == (None, "at")
