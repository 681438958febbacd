"""A study of digits, as a user starts it: real processes, small ones."""

import json
import re
from pathlib import Path

from experiments.study import __main__ as door

ROOT = Path(__file__).parents[2]


def test_two_rows_of_digits(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("JAX_ENABLE_COMPILATION_CACHE")
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    given = ["--rows=at,robal", "--dataset=digits", "--epochs=2", "--scales=1,10", "--name=small"]
    given += [f"--workdirs={tmp_path}/runs", f"--out={tmp_path}", "--config.eval.only=('pgd20',)"]
    given += ["--config.eval.subset_per_class=20", "--config.attack.num_steps=2"]
    assert door.main(given) == 0, capfd.readouterr()
    folder = tmp_path / "small"
    table = json.loads((folder / "table.json").read_text())
    assert list(table["rows"]) == ["at", "robal"] and not table["failed"]
    assert table["about"]["images"] == 200 and table["about"]["epochs"] == 2 and table["about"]["eps"] == 0.1
    for name, row in table["rows"].items():
        figures = {k: v["mean"] for k, v in row["figures"].items()}
        assert figures["eval/clean/accuracy"] > 0.2, "two epochs are enough to be above chance"
        assert figures["eval/worst/accuracy"] <= figures["eval/pgd20/accuracy"]
        assert row["training_seconds"]["mean"] > 0 and [scale for scale, _ in row["scales"]] == [1, 10]
        log = (tmp_path / "runs" / f"{name}-seed0-subset.log").read_text()
        assert "Report:" in log
        result = (folder / f"{name}-seed0-subset.json").read_text()
        assert str(tmp_path) not in result and json.loads(result)["report"]["context"]["training_seconds"] > 0
    text = (folder / "table.md").read_text()
    pictures = re.findall(r"!\[\w+\]\((.*?)\)", text)
    assert sorted(pictures) == [f"plots/{name}.png" for name in ("classes", "errors", "logit_scale", "robustness")]
    assert all((folder / picture).stat().st_size > 10_000 for picture in pictures)
    capfd.readouterr()
    assert door.main(given) == 0 and capfd.readouterr().out.startswith("0 of 4 runs are left.")
    assert json.loads((folder / "table.json").read_text()) == table
