"""Class names with characters that break tables, markup and plots are shown literally."""

import io
import re

import numpy as np
import pytest
import rich.console

from lt_adv.evaluation import Records, markdown_report, plots, print_summary, summarise
from lt_adv.evaluation.report import escape_markdown, table

NAMES = [
    "line\nbreak",
    "two\r\nlines",
    "a|bar",
    "a\\|bar",
    "end\\",
    "[red]colour[/red]",
    "[/b]",
    "$formula_$",
    "one$",
    "<b>bold</b>",
    "<!-- gone",
    "`code",
    "",
    " ",
    "tab\t",
    "\x1b[31mterminal",
    "paragraph\u2029",
    "next\x85line",
    "\u202eright to left",
    "twice",
    "twice",
    "ünï",
]
COUNTS = [100 - c for c in range(len(NAMES))]


@pytest.fixture
def records():
    label = np.repeat(np.arange(len(NAMES), dtype=np.int32), 2)
    header = {"class_names": NAMES, "attacks": {"pgd20": {"attack": "pgd"}}, "images": len(label), "device": "cpu"}
    header["images_per_class"] = [2] * len(NAMES)
    return Records(header, np.arange(len(label)), label, np.zeros_like(label), {"pgd20": np.roll(label, 1)})


def cells(row):
    """Splits a table row as GitHub does: at bars that do not follow an odd number of backslashes."""
    assert row.startswith("| ") and row.endswith(" |")
    return re.sub(r"\\(.)", lambda match: match[1] if match[1] != "|" else "\0", row[2:-2]).split(" | ")


def test_the_report_has_a_row_for_each_class(records):
    text = markdown_report({**summarise(records, COUNTS), "context": {"class_counts": COUNTS}})
    assert text.splitlines() == text.removesuffix("\n").split("\n"), "no other kind of line break"
    section = text.split("## Classes\n\n")[1].strip().split("\n")
    rows = [cells(row) for row in section[2:]]
    assert len(rows) == len(NAMES) and {len(row) for row in rows} == {9}
    shown = [row[0].replace("\0", "|") for row in rows]
    assert shown[:4] == ["line\\nbreak", "two\\r\\nlines", "a|bar", "a\\|bar"]
    assert shown[12:14] == ["''", "' '"] and shown[19:] == ["twice", "twice", "ünï"]
    assert shown[5:8] == NAMES[5:8] and not re.search(r"(?<!\\)[<`$]", text)
    (warning,) = [line for line in text.splitlines() if "never predicted" in line]
    assert warning.startswith("> **Warning.** clean: 21 of 22 classes")


def test_table_cells_are_escaped():
    lines = table(["a|b", "c\nd"], [["\\|", "x"]], left=2).split("\n")
    assert lines == ["| a\\|b | c\\nd |", "| :-- | :-- |", "| \\| | x |"]
    assert escape_markdown("great_white") == "great_white" and escape_markdown("_a_") == "\\_a\\_"


def test_plots_show_names_literally(records):
    figure = plots.accuracy_by_class(summarise(records, COUNTS))
    ticks = [text for axes in figure.axes[1::2] for text in axes.get_xticklabels()]
    assert [text.get_text() for text in ticks][:1] + [text.get_text() for text in ticks][7:9] == [
        "line\\nbreak",
        "\\$formula_\\$",
        "one\\$",
    ]
    assert plots.png(figure).startswith(b"\x89PNG")
    groups = [text.get_text() for text in figure.axes[0].texts if text.get_text() in ("head", "body", "tail")]
    assert groups == ["head", "body", "tail"], "classes of the same name are grouped by position"
    image = np.zeros((2, 4, 4, 1))
    shown = {"attack": "pgd", "eps": 0.1, "clean": image, "adversarial": image, "label": np.array([0, 8])}
    shown |= {"clean_prediction": np.array([7, 8]), "prediction": np.array([0, 12])}
    assert plots.png(plots.example_images(shown, NAMES, COUNTS)).startswith(b"\x89PNG")


@pytest.mark.parametrize("markup", [True, False])
def test_names_are_not_markup_in_the_terminal(records, markup):
    records = Records(records.header, records.index, records.label, records.clean, {"[red]x": records.clean})
    summary = {**summarise(records, COUNTS), "context": {"class_counts": COUNTS}}
    console = rich.console.Console(file=io.StringIO(), width=500, markup=markup)
    print_summary(summary, console)
    text = console.file.getvalue()
    assert "[red]x" in text and "[red]colour[/red]" in text and "\x1b[31m" not in text and "two\\r\\nlines" in text
