"""README.md fits one screen and its examples run; the generated tables equal the records."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

import lt_adv
from experiments import tables
from experiments.study.rows import ROWS
from lt_adv import losses

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()


def examples(page):
    """The python blocks of a page."""
    return re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("page", ["README.md", "docs/attacks.md"])
def test_the_attack_examples_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    for example in examples(page):
        exec(compile(example, page, "exec"), scope)
    moved = np.abs(np.asarray(scope["x_adv"] - scope["x"]))
    assert moved.shape == (4, 8, 8, 1) and moved.max() == pytest.approx(8 / 255, abs=1e-6)
    loss = [losses.cross_entropy(scope["apply"](scope["variables"], scope[x]), scope["y"]) for x in ("x", "x_adv")]
    assert np.all(loss[1] > loss[0])
    assert list(scope["result"].accuracy) == ["clean", "apgd-ce", "apgd-t", "fab-t", "square"]
    label, logits_fn = scope.get("labels", scope["y"]), scope.get("network") or scope["logits_fn"]
    np.testing.assert_array_equal(scope["result"].robust, logits_fn(scope["result"].x_adv).argmax(-1) == label)
    if "report" in scope:
        assert list(scope["report"].records.attacks) == ["pgd20", "cw20", "autoattack"]
        assert (tmp_path / "report" / "report.md").exists() and "Worst case" in str(scope["report"])
    if "noisy_result" in scope:
        assert list(scope["noisy_result"].accuracy) == ["clean", "apgd-ce", "apgd-dlr"]
        assert scope["noisy_result"].robust.any() and not scope["noisy_result"].robust.all()


def test_readme_fits_one_page():
    assert len(TEXT.splitlines()) <= 200 and len(TEXT.encode()) <= 12_000
    generated = re.findall(r"^<!-- table .*?^<!-- end", TEXT, re.DOTALL | re.MULTILINE)
    assert generated and all(block.count("\n|") <= 2 + 10 for block in generated)
    assert not re.search(r"not measured yet", TEXT)


def test_readme_names_every_config():
    configs = {path.stem for path in (ROOT / "configs").glob("*.py")} - {"__init__", "common"}
    (table,) = re.findall(r"^\| Method \|.*?\n\n", TEXT, re.DOTALL | re.MULTILINE)
    named = [name for line in table.splitlines() if line for name in re.findall(r"`(\w+)`", line.split("|")[3])]
    assert sorted(named) == sorted(configs)


@pytest.mark.parametrize("page", tables.PAGES)
def test_tables_are_up_to_date(page):
    text, expected = tables.page(ROOT, page)
    assert text == expected, "run python -m experiments.tables"


def test_every_table_is_in_one_page():
    assert sorted(name for names in tables.PAGES.values() for name in names) == sorted(tables.TABLES)


def result(clean, pgd20, **extra):
    metrics = {f"eval/{c}/accuracy": v for c, v in {"clean": clean, "pgd20": pgd20, "worst": pgd20}.items()}
    metrics |= {"eval/pgd20/accuracy_tail": 0.125, "eval/pgd20/accuracy_head": None}
    header = {
        "dataset": "CIFAR-10-LT (JPEG copy), exponential profile",
        "model": "wide_resnet-10-1, head linear, float32",
        "epochs": 10,
        "images": 10000,
        "subset": "the whole test split",
        "device": "1 x cpu",
        "jax_version": "0.10.2",
        "attacks": {"pgd20": {"eps": 0.031}},
    }
    return {"report": {"header": header, "metrics": metrics, "conditions": ["clean", "pgd20", "worst"]}, **extra}


@pytest.fixture
def measured(tmp_path):
    folder = tmp_path / "jpeg_rows"
    folder.mkdir()
    for name, content in {
        "robal-seed0-full": result(0.4, 0.2, commit="0123456789ab"),
        "robal-seed1-full": result(0.44, 0.21, commit="0123456789ab"),
        "at-seed0-full": result(0.3, 0.1),
    }.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return tmp_path


def test_results_become_rows(measured):
    text = tables.jpeg_rows(measured).splitlines()
    assert text[0] == (
        "CIFAR-10-LT (JPEG copy), exponential profile; WRN-10-1, 10 epochs, eps 0.031 = 7.905/255; 10000 test images "
        "(the whole test split); 1 x cpu, jax 0.10.2; not measured yet: AT-BSL."
    )
    head, _, robal, at = ([cell.strip() for cell in line.strip("|").split("|")] for line in text[2:])
    robal, at = dict(zip(head, robal, strict=True)), dict(zip(head, at, strict=True))
    assert robal[""] == "RoBal-N" and robal["Seeds"] == "2" and at[""] == "AT" and at["Seeds"] == "1"
    assert robal["Clean"] == "42.0 ± 2.8" and robal["PGD-20"] == "20.5 ± 0.7" and at["Clean"] == "30.0"
    assert robal["PGD-20, tail"] == "12.5 ± 0.0" and robal["PGD-20, head"] == "" and "Worst case" not in head


def test_pictures_of_results_are_shown(measured):
    assert "![" not in tables.jpeg_rows(measured)
    picture = measured / "jpeg_rows" / "plots-at-full" / "accuracy_by_class.png"
    picture.parent.mkdir()
    picture.touch()
    shown = tables.jpeg_rows(measured).splitlines()
    assert shown[-3] == "| AT |" and "(experiments/results/jpeg_rows/plots-at-full/accuracy_by_class.png)" in shown[-1]


def test_index_shows_paper_and_published_number():
    lines = {line.split("`")[1]: line for line in tables.index().splitlines()[2:]}
    assert "clean 72.73" in lines["robal"] and "| Wu et al., CVPR 2021 |" in lines["robal"]
    assert lines["deferred_margin"].endswith("| – |")


def cells(text):
    """{config: its rows of the table `measured`, as lists of cells}"""
    rows: dict[str, list[list[str]]] = {}
    for line in text.splitlines()[2:]:
        config, *rest = (cell.strip() for cell in line.strip("|").split("|"))
        rows.setdefault(config.strip("`"), []).append(rest)
    return rows


SETTING = "CIFAR-10-LT (JPEG copy), exponential profile; WRN-10-1, 10 epochs"


def test_measured_numbers_are_listed_by_config(measured):
    rows = cells(tables.measured(results=measured))
    assert rows["robal"] == [["RoBal-N", SETTING, "10,000", "2", "42.0 ± 2.8", "20.5 ± 0.7", "012345678"]]
    assert rows["at"] == [["AT", SETTING, "10,000", "1", "30.0", "10.0", "–"]]
    assert rows["trades"][0][1] == "not measured yet"


def test_measured_numbers_of_the_rows_of_a_config(measured):
    """A study names its results by row; ablations and what was measured on validation images are no claim."""
    varied = next(name for name, row in ROWS.items() if row.varies == "reat")
    validated = result(0.9, 0.8, row="trades")
    validated["report"]["header"]["split"] = "validation"
    for folder, contents in {
        "cpu": {
            "posthoc_cdt-seed0-subset": result(0.5, 0.25, row="posthoc_cdt"),
            "tau_norm-seed0-subset": result(0.6, 0.3, row="tau_norm"),
            "tau_norm-seed0-scales": result(0.6, 0.1, row="tau_norm"),
            "trades-seed0-subset": validated,
            f"{varied}-seed0-subset": result(0.9, 0.8, row=varied),
        },
        "ablation": {"reat-seed0-full": result(0.9, 0.8, row="reat")},
    }.items():
        (measured / folder).mkdir()
        for name, content in contents.items():
            (measured / folder / f"{name}.json").write_text(json.dumps(content))
    rows = cells(tables.measured(results=measured))
    assert rows["posthoc"] == [
        ["CDT, post hoc", SETTING, "10,000", "1", "50.0", "25.0", "–"],
        ["Tau-normalisation", SETTING, "10,000", "1", "60.0", "30.0", "–"],
    ]
    assert all(rows[config][0][1] == "not measured yet" for config in ("trades", "reat"))


def test_an_outdated_page_is_reported(tmp_path, monkeypatch, capsys):
    text = (ROOT / "docs/methods.md").read_text()
    page = tmp_path / "docs" / "methods.md"
    page.parent.mkdir()
    page.write_text(text.replace("| [`at`]", "| [`att`]"))
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "PAGES", {"docs/methods.md": ("index",)})
    monkeypatch.setattr(sys, "argv", ["tables", "--check"])
    assert tables.main() == 1 and "docs/methods.md are out of date" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["tables"])
    assert tables.main() == 0 and page.read_text() == text
    with pytest.raises(ValueError, match="index"):
        tables.rendered("no markers", {"index": str})


def test_relative_links_of_tables_are_relative_to_the_page():
    text = "<!-- table a -->\n<!-- end a -->"
    made = tables.rendered(text, {"a": lambda: "[x](configs/x.py) [y](https://y.org) [z](#z)"}, "../")
    assert made == "<!-- table a -->\n[x](../configs/x.py) [y](https://y.org) [z](#z)\n<!-- end a -->"


def test_versions_agree():
    changelog, citation = (ROOT / "CHANGELOG.md").read_text(), (ROOT / "CITATION.cff").read_text()
    assert re.search(r"^## (\S+)", changelog, re.MULTILINE)[1] == lt_adv.__version__
    assert re.search(r"^version: (\S+)", citation, re.MULTILINE)[1] == lt_adv.__version__
    assert f"version = {{{lt_adv.__version__}}}" in TEXT
