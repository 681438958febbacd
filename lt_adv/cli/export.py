"""Exports a trained network to a folder that jax can load without this project.

network.jax          the evaluated network, (weights, images) -> logits: StableHLO, written by `jax.export`
weights.safetensors  the weights, under flat names such as "params/head/kernel"
config.json          the config of the training
README.md            the model card, with the lines that load the network

The weights are an argument of the network and a separate file, so they can be inspected and replaced.
"""

import importlib.metadata
import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax
import jax
import jax.export  # `import jax` does not import it
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from lt_adv import data, evaluation
from lt_adv.attacks import convolutions
from lt_adv.cli import evaluate, networks, record_header, workdirs
from lt_adv.cli.experiment import Experiment
from lt_adv.models import posthoc
from lt_adv.runtime import atomic_io, environment
from lt_adv.training import metric_logging

PLATFORMS = ("cpu", "cuda", "tpu")
EXTRA = ("flatbuffers", "safetensors")  # packages of the extra `export`; jax.export imports flatbuffers

EXAMPLE = """\
import jax.export
import numpy as np
from safetensors.numpy import load_file

weights = jax.device_put(load_file("weights.safetensors"))
network = jax.export.deserialize(bytearray(np.fromfile("network.jax", np.uint8)))
predict = jax.jit(network.call)
x = np.zeros({shape}, np.float32)  # images in [0, 1], any number of them
logits = predict(weights, x)
"""

GRADIENT = """\
gradient = jax.grad(lambda x: predict(weights, x)[:, 0].sum())(x)  # of the first logit
"""

CARD = """\
# {title}

A classifier of images [{shape}] with {number} classes of unequal size, trained with lt_adv to be robust against small
perturbations of its input.

{facts}

## Use

With `pip install jax flatbuffers safetensors`, in this folder:

```python
{example}```

`x` is [batch, {shape}], float32, pixels in [0, 1] and not normalised; `logits` is [batch, {number}]. `weights` maps
names to arrays, which can be replaced by others of the same shapes. Gradients exist with respect to images and weights,
for example for attacks:

```python
{gradient}```

## Classes

{classes}

{results}
## Limits

- Robustness was measured only under the attacks above, if any, at their radii, on images of this data set: not under
  stronger or adaptive attacks, in other norms, under corruptions or on other data.
- The file runs on {platforms} and on no other platform. It is tested on CPU; on accelerators logits differ by rounding.
- jax guarantees to load such a file for six months in newer versions, and not in older ones. After that, export the
  checkpoint again. The weights stay readable.
- Gradients exist, but not second derivatives, `vmap` or empty batches.

## Licence

The code of lt_adv is licensed under Apache-2.0. The licence of the data set may restrict the use of the weights.
"""


def export(config: ConfigDict, workdir: epath.Path, command: str) -> None:
    """Writes the folder `<workdir>/export` atomically; the same checkpoint and versions give the same bytes.

    With a report name, `eval.report`, the folder is reports/<name>/export and the card shows that report. The network
    is the one that --mode=eval evaluates: `eval.checkpoint`, averaged weights, `eval.dtype`, `eval.adjustment`.

    Args:
        config: the config of the run.
        workdir: the working directory of the run.
        command: the command that started the run, for the card.

    Raises:
        ImportError: packages of the extra `export` are missing.
        ValueError: training is not finished, the config differs from that of the run, or another process uses the
            working directory.
        FileNotFoundError: there is no checkpoint.
    """
    if missing := [package for package in EXTRA if importlib.util.find_spec(package) is None]:
        raise ImportError(f"--mode=export needs {' and '.join(missing)}: pip install -e '.[export]'.")
    from safetensors.numpy import save

    experiment = Experiment.from_config(config)
    if experiment.uses_external_weights:
        raise ValueError(
            "config.init_from names external weights: --mode=export only exports networks trained by lt_adv."
        )
    experiment.connect()
    if jax.process_count() > 1:
        raise ValueError("--mode=export runs in one process: start a single one.")
    evaluate.check_baseline(config)
    network, split = networks.load(experiment, workdir), experiment.split
    facts = record_header.header(experiment, network.meta, subset="")
    if facts["training"] != "finished":
        raise ValueError(f"{workdir} is at {networks.position(network.meta)}: let the training finish, then export it.")
    weights = flatten(posthoc.select_variables(config.eval.adjustment, network.variables))
    shape = tuple(split.train.image.shape[1:])
    expected = {"weights_digest": evaluation.weights_digest(network.variables)}
    expected |= {name: facts[name] for name in ("model", "adjustment", "split", "dataset_digest")}
    directory = evaluate.report_directory(config, workdir)
    contents = {
        "network.jax": bytes(serialise(network.apply, weights, shape)),
        "weights.safetensors": save(weights),
        "config.json": (json.dumps(config.to_dict(), indent=1, sort_keys=True) + "\n").encode(),
        "README.md": card(facts, command, split, *read_report(directory, expected)).encode(),
    }
    with workdirs.locked(workdir):
        atomic_io.replace_folder(directory / "export", contents)
    size = sum(map(len, contents.values())) / 1e6
    metric_logging.console.print(
        f"Export: {directory / 'export'}, {size:.1f} MB; README.md shows how to load it.", soft_wrap=True
    )


def flatten(variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns the arrays of `variables` under flat names, {"params/head/kernel": array, ...}."""
    leaves = flax.traverse_util.flatten_dict(dict(variables), sep="/")
    return {name: np.ascontiguousarray(leaf) for name, leaf in leaves.items()}


def serialise(apply: Callable[..., jax.Array], weights: Mapping[str, np.ndarray], shape: Sequence[int]) -> bytearray:
    """Returns the bytes of the network for `jax.export.deserialize`.

    The network is `(weights, x [batch, *shape] float32) -> logits [batch, classes]`, for any batch of at least one
    image, on each of `PLATFORMS`, with its first derivative in both arguments.

    Args:
        apply: `(variables, x) -> logits`.
        weights: arrays under flat names.
        shape: of an image.
    """

    def network(weights: Mapping[str, jax.Array], x: jax.Array) -> jax.Array:
        return apply(flax.traverse_util.unflatten_dict(weights, sep="/"), x)

    def gradient(weights: Any, x: Any, cotangent: Any) -> Any:
        return jax.vjp(network, weights, x)[1](cotangent)

    def backward(inputs: Any, cotangent: Any) -> Any:
        # An exported program cannot be rewritten later, and attacks are loops: see attacks/convolutions.py.
        on_cpu = convolutions.rewrite_convolutions(gradient)
        return jax.lax.platform_dependent(*inputs, cotangent, cpu=on_cpu, default=gradient)

    differentiable = jax.custom_vjp(network)
    differentiable.defvjp(lambda *inputs: (network(*inputs), inputs), backward)
    images = jax.export.symbolic_shape(", ".join(["batch", *map(str, shape)]))
    arguments = jax.tree.map(jax.typeof, dict(weights)), jax.ShapeDtypeStruct(images, jnp.float32)
    # Source locations would put paths of this machine into the file, and give other bytes elsewhere.
    limit = jax.config.jax_traceback_in_locations_limit  # type: ignore[attr-defined]
    jax.config.update("jax_traceback_in_locations_limit", 0)
    try:
        return jax.export.export(jax.jit(differentiable), platforms=PLATFORMS)(*arguments).serialize(vjp_order=1)
    finally:
        jax.config.update("jax_traceback_in_locations_limit", limit)


def read_report(directory: epath.Path, expected: Mapping[str, str]) -> tuple[dict[str, Any] | None, str]:
    """Returns (report.json of a directory, ""), or (None, reason) if it is missing or its header is not as expected."""
    path = directory / "report.json"
    if not path.exists():
        return None, "there is no report"
    try:
        summary = json.loads(path.read_text())
    except ValueError as error:
        why = atomic_io.reason(path, error, atomic_io.JSON)
        raise ValueError(f"{path} is damaged ({why}): write it again with --mode=eval.") from error
    header = summary["header"]
    if different := [name for name in expected if header.get(name) != expected[name]]:
        return None, f"the report is of another {different[0].replace('_', ' ')}"
    return summary, ""


def card(
    facts: Mapping[str, Any], command: str, split: data.LongTailed, summary: dict[str, Any] | None, missing: str
) -> str:
    """Returns the model card in markdown: description, use, classes, results and limits of the network."""
    commit = f" ({environment.commit()})" if environment.commit() else ""
    versions = [f"lt_adv {facts['lt_adv_version']}{commit}", f"python {facts['python_version']}"]
    versions += [f"{name} {importlib.metadata.version(name)}" for name in ("jax", "flax", "numpy")]
    lines = {
        "Method": facts["method"],
        "Network": facts["model"],
        "Adjustment after training": f"{facts['adjustment']} (included in the logits)",
        "Data set": f"{facts['dataset']}, imbalance ratio {max(split.class_counts) / min(split.class_counts):.4g}",
        "Training": f"{facts['epochs']} epochs, seed {facts['seed']}, fidelity {facts['fidelity']}",
        "Training attack": facts["training_attack"],
        "Weights": f"{facts['weights']}; {facts['checkpoint']} checkpoint, step {facts['checkpoint_step']} of "
        f"{facts['stage']}",
        "Trained by": f"`{command}`; all values are in [config.json](config.json)",
        "Exported by": f"the same with `--mode=export`; {', '.join(versions)}",
    }
    shape, counts = split.train.image.shape[1:], split.class_counts
    names = [evaluation.escape_markdown(name) for name in split.class_names]
    classes = [[str(i), name, str(n)] for i, (name, n) in enumerate(zip(names, counts, strict=True))]
    method = " + ".join(part.split(" (")[0] for part in facts["method"].split(" + "))
    return CARD.format(
        title=f"{method} on {facts['dataset'].split(',')[0]}",
        facts="\n".join(f"- **{name}:** {value}" for name, value in lines.items()),
        shape=", ".join(map(str, shape)),
        example=EXAMPLE.format(shape=(3, *shape)),
        gradient=GRADIENT,
        number=len(names),
        classes=evaluation.table(["Index", "Class", "Training images"], classes, left=2),
        results=results_section(summary) if summary else f"## Accuracy\n\nNot evaluated: {missing}.\n",
        platforms=", ".join(PLATFORMS),
    )


def results_section(summary: dict[str, Any]) -> str:
    """Returns warnings and accuracies of the report, and the setup of the measurement."""
    fields = evaluation.header_fields(summary)
    setup = [f"- **{name}:** {fields[name]}" for name in ("Images", "Device", "Versions", "Commit") if name in fields]
    return "\n".join(
        [*evaluation.warning_lines(summary), *evaluation.accuracy_sections(summary), "Measured on:", "", *setup, ""]
    )
