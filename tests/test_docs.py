"""The documentation is true: code blocks run, commands parse, links and anchors exist, tables equal the records."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from experiments import front_figure
from lt_adv.cli import flags
from lt_adv.cli.experiment import Experiment
from lt_adv.evaluation import attack_specs
from lt_adv.evaluation.masking import diagnose

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "CONTRIBUTING.md", *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/**/*.md")))
WITH_COMMANDS = (*PAGES, "experiments/gpu_queue.md")
TEXT = {name: (ROOT / name).read_text() for name in WITH_COMMANDS}
PYTHON = re.compile(r"(<!-- not run: [^\n]+ -->\n)?^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
BASH = re.compile(r"^```bash\n(.*?)^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")


def code(page):
    """The python blocks of a page that run here."""
    return [block for not_run, block in PYTHON.findall(TEXT[page]) if not not_run]


def run(page, scope=None):
    """Executes the blocks of a page in order, in one scope, and returns the scope."""
    scope = {} if scope is None else scope
    for block in code(page):
        exec(compile(block, page, "exec"), scope)
    return scope


def anchors(text):
    """The anchors that GitHub and MkDocs give the headings of a page."""
    without_code = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", without_code, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_page_with_code_is_run_by_a_test():
    here = {"README.md"} | {
        f"docs/{p}.md" for p in ("attacks", "configuration", "evaluation", "quickstart", "records", "robustness_curve")
    }
    assert {page for page in PAGES if code(page)} == here


def test_quickstart_runs():
    scope = run("docs/quickstart.md")
    assert scope["x_adv"].shape == (4, 8, 8, 1)


def test_any_network_is_evaluated(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(diagnose, "QUERIES", 20)
    result = run("docs/evaluation.md")["result"]
    metrics = result.summary["metrics"]
    assert metrics["eval/clean/accuracy"] > 0.65 > metrics["eval/worst/accuracy"] > 0.55
    assert metrics["eval/worst/accuracy_head"] > metrics["eval/worst/accuracy_tail"]
    assert {path.name for path in (tmp_path / "linear").iterdir()} == {"report.md", "report.json", "plots", "eval"}
    printed = capsys.readouterr().out
    assert "Worst case" in printed and str(metrics["eval/worst/accuracy_tail"]) in printed


def test_config_of_the_configuration_page_is_valid():
    config = Experiment.from_config(run("docs/configuration.md")["get_config"]("dataset=digits")).config
    assert config.model.head.name == "cosine" and config.eval.attacks.pgd20_l2.norm == "l2" and config.model.dropout


@pytest.mark.parametrize("attack", attack_specs.NAMES)
def test_options_of_evaluation_attacks_are_listed(attack):
    (table,) = re.findall(r"^\| Option \|.*?\n\n", TEXT["docs/evaluation.md"], re.DOTALL | re.MULTILINE)
    listed = set()
    for options, attacks, _ in re.findall(r"^\| (.*) \| (.*) \| (.*) \|$", table, re.MULTILINE)[1:]:
        if attacks.startswith("all") != (f"`{attack}`" in attacks):
            listed |= set(re.findall(r"`(\w+)`", options))
    with pytest.raises(ValueError) as error:
        attack_specs.resolve({"attack": attack, "unknown": 0})
    assert listed == set(re.search(r"There are: (.*)\.", str(error.value))[1].split(", "))


def test_robustness_curve_falls_from_clean_accuracy_to_zero(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    scope = run("docs/robustness_curve.md")
    curve = scope["robust_accuracy"]
    assert curve[0] > 0.85 and curve[-1] < 0.1 and np.all(np.diff(curve) <= 0.01)
    assert (tmp_path / "robust_accuracy.png").stat().st_size > 1000


def test_records_page_runs_on_saved_records(tmp_path, monkeypatch):
    """On records of three classes: class 2 is lost under PGD-20, where its images are classified as class 0."""
    label = np.repeat(np.arange(3, dtype=np.int32), 4)
    pgd20 = np.where(label == 2, 0, label).astype(np.int32)
    pgd20[0] = 1
    options = {"attack": "pgd", "eps": 0.1}
    header = {"class_names": ["a", "b", "c"], "images": 12, "batch_size": 12, "attacks": {"pgd20": options}}
    folder = tmp_path / "workdirs" / "at-dataset=digits" / "eval" / "records" / "0123456789ab"
    folder.mkdir(parents=True)
    (folder / "header.json").write_text(json.dumps(header))
    columns = {"index": np.arange(12), "label": label, "clean": label, "attack/pgd20": pgd20}
    np.savez(folder / "batch-00000.npz", **columns)
    monkeypatch.chdir(tmp_path)
    scope = run("docs/records.md")
    assert scope["geometric_mean_accuracy"]("clean") == pytest.approx(1)
    assert scope["geometric_mean_accuracy"]("pgd20") == pytest.approx((0.75 * 1 * 1e-12) ** (1 / 3))
    assert scope["share_attracted_by"]([0], "pgd20") == pytest.approx(4 / 5)
    assert len(scope["table"]) == 12 and scope["records"].correct("worst").sum() == 7


@pytest.mark.parametrize("page", [page for page in WITH_COMMANDS if "lt_adv.main --config" in TEXT[page]])
def test_commands_are_valid(page):
    parts = [part for block in BASH.findall(TEXT[page]) for line in block.splitlines() for part in line.split(" && ")]
    for command in (shlex.split(part) for part in parts if "lt_adv.main --" in part):
        Experiment.from_config(flags.parse(command[command.index("lt_adv.main") :]).config)


@pytest.mark.parametrize("page", PAGES)
def test_links_and_anchors_exist(page):
    here = (ROOT / page).parent
    for link in LINK.findall(TEXT[page]):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = here / path if path else ROOT / page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.read_text()), link


def test_extras_exist():
    setup = (ROOT / "setup.cfg").read_text()
    for page, text in TEXT.items():
        for extra in {name for names in re.findall(r"\.\[([\w,-]+)\]", text) for name in names.split(",")}:
            assert re.search(rf"^{extra} =", setup, re.MULTILINE), (page, extra)


def test_all_methods_have_an_api_entry():
    modules = {path.stem for path in (ROOT / "lt_adv" / "methods").glob("*.py")} - {"__init__"}
    assert modules <= set(re.findall(r"^::: lt_adv\.methods\.(\w+)$", TEXT["docs/api/methods.md"], re.MULTILINE))


def test_every_page_is_in_the_navigation():
    listed = set(re.findall(r": ([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    assert {f"docs/{page}" for page in listed} == {page for page in PAGES if page.startswith("docs/")}


def test_front_figure_shows_the_records():
    classes = front_figure.read()
    assert set(classes) == {"at", "robal"} and all(len(rows) == 10 for rows in classes.values())
    bars = front_figure.figure(classes).axes[0].patches
    expected = [100 * row["accuracy"]["pgd20"] for rows in classes.values() for row in rows]
    np.testing.assert_allclose([bar.get_height() for bar in bars], expected)
    assert front_figure.OUT.exists()
