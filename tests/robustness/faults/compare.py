"""Digests of all results of a run, to compare two runs bit for bit."""

import hashlib
import warnings
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from tests.robustness.faults.run import Run

EXPORTED = ("network.jax", "weights.safetensors")  # the other exported files contain paths
EXCLUDED = ("checkpoints", "damaged", "eval")  # their content is compared, or depends on the faults


def result_digests(run: Run) -> dict[str, str]:
    """Returns {result: digest} of the last checkpoint's arrays, the metrics, the predictions, the export and the names
    of all files."""
    results = {f"file {path}": "" for path in files(run.folder)}
    results |= {f"checkpoint {step}": "" for step in run.checkpoints()}
    results |= {f"array {name}": text for name, text in arrays(run.newest_checkpoint() / "state").items()}
    results["metrics.jsonl"] = _digest((run.folder / "metrics.jsonl").read_bytes())
    results |= {f"export/{name}": _digest((run.folder / "export" / name).read_bytes()) for name in EXPORTED}
    for path in sorted(run.folder.glob("eval/records/*/*.npz")):
        with np.load(path) as columns:
            results |= {f"{path.stem} {name}": _array(columns[name]) for name in columns.files}
    return results


def files(folder: Path) -> list[str]:
    """Returns the names of all files of a run except checkpoints and records."""
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(str(path) for path in paths if path.parts[0] not in EXCLUDED)


def arrays(state: Path) -> dict[str, str]:
    """Reads the arrays with Orbax directly, not through the code under test."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about shardings that are read from the checkpoint
        handler = ocp.PyTreeCheckpointHandler()
        item = handler.metadata(state).tree
        sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])  # whatever devices it was saved on
        restore_args = jax.tree.map(lambda _: ocp.ArrayRestoreArgs(sharding=sharding), item)
        tree = handler.restore(state, args=ocp.args.PyTreeRestore(item=item, restore_args=restore_args))
    tree["key"] = jax.random.key_data(tree["key"])
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): _array(np.asarray(leaf)) for path, leaf in leaves}


def mismatches(first: dict[str, str], second: dict[str, str]) -> list[str]:
    """Returns the names of the results that differ."""
    return sorted(name for name in first.keys() | second.keys() if first.get(name) != second.get(name))


def _array(array: np.ndarray) -> str:
    return f"{array.dtype} {array.shape} {_digest(np.ascontiguousarray(array).tobytes())}"


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
