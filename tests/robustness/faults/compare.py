"""Digests of all results of a run: two runs have the same results exactly if these are equal."""

import hashlib
import warnings
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from tests.robustness.faults.run import Run

EXPORTED = ("network.jax", "weights.safetensors")  # the others name folders
LEFT_OUT = ("checkpoints", "damaged", "eval")  # compared by content, or of faults; records lie below a digest


def end(run: Run) -> dict[str, str]:
    """Every array of the last checkpoint, the lines of training, every prediction, the export, and which files lie
    about."""
    results = {f"file {path}": "" for path in files(run.folder)}
    results |= {f"checkpoint {step}": "" for step in run.checkpoints()}
    results |= {f"array {name}": text for name, text in arrays(run.newest() / "state").items()}
    results["metrics.jsonl"] = _digest((run.folder / "metrics.jsonl").read_bytes())
    results |= {f"export/{name}": _digest((run.folder / "export" / name).read_bytes()) for name in EXPORTED}
    for path in sorted(run.folder.glob("eval/records/*/*.npz")):
        with np.load(path) as columns:
            results |= {f"{path.stem} {name}": _array(columns[name]) for name in columns.files}
    return results


def files(folder: Path) -> list[str]:
    """Names of all files of a run but checkpoints and records."""
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(str(path) for path in paths if path.parts[0] not in LEFT_OUT)


def arrays(state: Path) -> dict[str, str]:
    """Read as orbax reads them, and not through the code that is tried here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of shardings that are not told: it is the same machine
        handler = ocp.PyTreeCheckpointHandler()
        item = handler.metadata(state).tree
        one = jax.sharding.SingleDeviceSharding(jax.devices()[0])  # whatever devices it was saved on
        given = jax.tree.map(lambda _: ocp.ArrayRestoreArgs(sharding=one), item)
        tree = handler.restore(state, args=ocp.args.PyTreeRestore(item=item, restore_args=given))
    tree["key"] = jax.random.key_data(tree["key"])
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): _array(np.asarray(leaf)) for path, leaf in leaves}


def mismatches(first: dict[str, str], second: dict[str, str]) -> list[str]:
    """The names of results that are not equal in both."""
    return sorted(name for name in first.keys() | second.keys() if first.get(name) != second.get(name))


def _array(array: np.ndarray) -> str:
    return f"{array.dtype} {array.shape} {_digest(np.ascontiguousarray(array).tobytes())}"


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
