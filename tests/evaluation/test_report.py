import io
import json
import sys

import numpy as np
import pytest
import rich.console
from matplotlib.image import imread

from lt_adv.evaluation import Records, markdown_report, plots, print_summary, read_records, summarise, write_report
from lt_adv.evaluation.metrics import title
from lt_adv.evaluation.report import format_duration, format_length

CONTEXT = {
    "class_counts": (10, 100, 1),
    "class_counts_before": (12, 102, 3),
    "model": "wide_resnet 10-1",
    "method": "robal",
    "dataset": "digits",
    "training_seconds": 3723.4,
}


def test_files_of_a_report(hand_made, tmp_path):
    history = tmp_path / "metrics.jsonl"
    lines = [{"step": i, "epoch": i, "train/loss": 2.0 / i, "eval/clean/accuracy": 0.1 * i} for i in (1, 2, 3)]
    history.write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 4, "tr')
    images = np.linspace(0, 1, 3 * 64, dtype=np.float32).reshape(3, 8, 8, 1)
    pictures = {"attack": "pgd20", "eps": 0.031, "clean": images, "adversarial": np.clip(images + 0.031, 0, 1)}
    pictures |= {
        "label": np.array([1, 0, 2]),
        "clean_prediction": np.array([1, 0, 0]),
        "prediction": np.array([0, 1, 0]),
    }
    context = {**CONTEXT, "metrics": history, "examples": pictures}
    summary = write_report(tmp_path, hand_made, context)
    assert json.loads((tmp_path / "report.json").read_text()) == summary
    assert summary["context"]["class_counts"] == [10, 100, 1]
    assert summary["header"] == hand_made.header
    names = {path.name for path in (tmp_path / "plots").iterdir()}
    assert names == {"accuracy_by_class.png", "robust_error.png", "training_curves.png", "examples.png"}
    for name in names:
        picture = imread(tmp_path / "plots" / name)
        assert min(picture.shape[:2]) > 200 and picture[..., :3].std() > 0.01
        assert f"](plots/{name})" in (tmp_path / "report.md").read_text()


def test_report_without_curves_or_examples(hand_made, tmp_path):
    write_report(tmp_path, hand_made, {**CONTEXT, "metrics": tmp_path / "none.jsonl"})
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {"accuracy_by_class.png", "robust_error.png"}


def test_markdown_of_a_report(hand_made):
    text = markdown_report({**summarise(hand_made, CONTEXT["class_counts"]), "context": CONTEXT})
    for line in (
        "> **Warning.** clean: 1 of 3 classes are never predicted on 6 images: cat.",
        "- **Model:** wide_resnet 10-1",
        "- **Method:** robal",
        "- **Images:** 6 (1 to 3 per class), the whole test split",
        "- **Training images per class:** 10, 100, 1 (total 111, imbalance ratio 100)",
        "- **Training images per class before the validation split:** 12, 102, 3 (total 117, imbalance ratio 34)",
        "- **Checkpoint step:** 1200",
        "- **Training time:** 1 h 02 min",
        "- **Seed:** 3",
        "- **Device:** 8 x cpu",
        "- **Versions:** code 1a2b3c, jax 0.10.2",
        "|  | Accuracy | Balanced | Head | Body | Tail |",
        "| Clean | 66.67 | 55.56 | 100.00 | 66.67 | 0.00 |",
        "| PGD-20 | 33.33 | 27.78 | 50.00 | 33.33 | 0.00 |",
        "| Worst case | 16.67 | 16.67 | 50.00 | 0.00 | 0.00 |",
        "| FGSM | FGSM, radius 0.03137254901960784 = 8/255, start zero |",
        "| PGD-20 | PGD, radius 0.031 = 7.905/255, step 0.0078 = 1.989/255, norm linf, start uniform, num steps 20 |",
        "| All | 6 | 33.33 | 50.00 | 83.33 |",
        "| Body | 3 | 33.33 | 66.67 | 100.00 |",
        "| ant | 10 | 3 | 66.67 | 66.67 | 33.33 | 0.00 | 33.33 | 66.67 | 100.00 |",
    ):
        assert line in text.splitlines(), line
    assert "(definition: thirds). head: bee; body: ant; tail: cat." in text


def test_the_report_names_the_subset(hand_made):
    header = {**hand_made.header, "subset": "2 per class, seed 0", "images_per_class": [2, 2, 2]}
    named = Records(header, hand_made.index, hand_made.label, hand_made.clean, hand_made.attacks)
    text = markdown_report({**summarise(named, CONTEXT["class_counts"]), "context": CONTEXT})
    assert "- **Images:** 6 (2 per class), 2 per class, seed 0" in text


def test_terminal_table_and_warnings(hand_made):
    console = rich.console.Console(file=io.StringIO(), width=100)
    print_summary({**summarise(hand_made, CONTEXT["class_counts"]), "context": CONTEXT}, console)
    text = console.file.getvalue()
    assert "PGD-20" in text and "16.67" in text and "Accuracy in per cent, 6 images" in text
    assert "warning: clean: 1 of 3 classes are never predicted" in text


def test_titles_lengths_and_durations():
    titles = {
        "pgd20": "PGD-20",
        "lsa": "LSA",
        "fgsm": "FGSM",
        "autoattack": "AutoAttack",
        "clean": "Clean",
        "my_pgd": "my_pgd",
    }
    assert {name: title(name) for name in titles} == titles
    assert format_length(0.031) == "0.031 = 7.905/255" and format_length(8 / 255) == "0.03137254901960784 = 8/255"
    assert format_duration(59.6) == "1 min 00 s" and format_duration(3661) == "1 h 01 min"


@pytest.mark.parametrize("classes", [2, 100, 200])
def test_plot_of_many_classes(classes):
    label = np.arange(2 * classes, dtype=np.int32) % classes
    names = [f"a rather long class name {c}" for c in range(classes)]
    header = {"class_names": names, "attacks": {"mim20": {}}}
    records = Records(header, np.arange(len(label)), label, label, {"mim20": np.roll(label, 1)})
    figure = plots.accuracy_by_class(summarise(records, [classes - c for c in range(classes)]))
    assert len(figure.axes) == 2 * -(-classes // 50)
    assert sum(len(axes.patches) for axes in figure.axes) == 3 * classes  # a bar for each class and condition
    shown = [label.get_text() for axes in figure.axes[1::2] for label in axes.get_xticklabels()]
    assert len(shown) == classes and all(text.startswith("a rather long") for text in shown)
    picture = plots.png(figure)
    assert picture.startswith(b"\x89PNG") and len(picture) > 10_000


def test_plots_do_not_import_pyplot(hand_made):
    before = "matplotlib.pyplot" in sys.modules  # another test may have imported it
    plots.png(plots.robust_error(summarise(hand_made, CONTEXT["class_counts"])))
    assert ("matplotlib.pyplot" in sys.modules) == before


def test_curves_with_missing_keys():
    history = [{"step": 1}, {"epoch": 1, "train/loss": 2.0}, {"epoch": 2, "train/loss": float("nan"), "note": "text"}]
    assert [axes.get_title("left") for axes in plots.training_curves(history).axes] == ["Training loss"]
    assert len(plots.training_curves(history).axes[0].lines[0].get_xdata()) == 1  # the NaN is not drawn
    steps = plots.training_curves(
        [{"step": 5, "valid/pgd20/accuracy_tail": 0.5}, {"step": 9, "valid/pgd20/accuracy_tail": 0.6}]
    )
    assert steps.axes[0].get_xlabel() == "step"
    assert steps.axes[0].lines[0].get_ydata().tolist() == [50.0, 60.0]
    assert plots.png(plots.training_curves([{"step": 1}]))


def test_a_group_has_one_colour_in_all_panels():
    ends = ("accuracy_head", "accuracy_body", "accuracy_tail")
    names = ["train/accuracy", "train/clean/balanced_accuracy"]
    names += [f"train/{c}{end}" for c in ("", "clean/") for end in ends]
    robust, clean = plots.training_curves([{"step": step, **dict.fromkeys(names, 0.5)} for step in (1, 2)]).axes
    colours = [{text.get_text(): text.get_color() for text in axes.texts} for axes in (robust, clean)]
    assert all(colours[0][group] == colours[1][group] for group in ("head", "body", "tail"))
    assert colours[0]["all"] == colours[1]["balanced"]


def test_curves_are_over_fractions_of_epochs_stage_after_stage():
    lines = [("a", 2, 1), ("a", 4, 1), ("a", 6, 2), ("a", 8, 2), ("b", 5, 1), ("b", 10, 1)]
    history = [{"stage": s, "step": n, "epoch": e, "train/loss": 1.0} for s, n, e in lines]
    axes = plots.training_curves(history).axes[0]
    assert axes.lines[0].get_xdata().tolist() == [0.5, 1.0, 1.5, 2.0, 2.5, 3.0] and axes.get_xlabel() == "epoch"


def test_from_evaluation_to_report(run, tmp_path):
    result, _ = run()
    summary = write_report(tmp_path, read_records(tmp_path), {"class_counts": (10, 100, 1)})
    assert summary["metrics"]["eval/pgd/accuracy"] == np.mean(result.attacks["pgd"] == result.label)
    assert "| LSA | PGD, radius 0.031 = 7.905/255" in (tmp_path / "report.md").read_text()
