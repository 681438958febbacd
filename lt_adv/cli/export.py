"""A trained network to take away: a folder that jax reads where this project is not installed.

network.jax          the network as it is evaluated, (weights, images) -> logits: StableHLO, written by `jax.export`
weights.safetensors  its weights, under flat names such as "params/head/kernel"
config.json          what it was trained with
README.md            the model card, with the lines that load it

The weights are an argument of the network and stand beside it: others can look at them, or put theirs in their place.
"""

import importlib.metadata
import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax
import jax
import jax.export  # a module of its own, which `import jax` leaves out
import jax.numpy as jnp
import ml_collections
import numpy as np
from etils import epath

from lt_adv import data, evaluation
from lt_adv.attacks import cpu_convolutions
from lt_adv.cli import run, schema, workdirs
from lt_adv.models import posthoc
from lt_adv.runtime import atomic_io, environment
from lt_adv.training import metric_logging, stage_builder

PLATFORMS = ("cpu", "cuda", "tpu")
EXTRA = ("flatbuffers", "safetensors")  # jax.export uses the first

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
towards = jax.grad(lambda x: predict(weights, x)[:, 0].sum())(x)  # where the first class gains
"""

CARD = """\
# {title}

A classifier of images [{shape}] in {number} classes of unequal size, trained with lt_adv to withstand small changes of
its input.

{facts}

## Use

With `pip install jax flatbuffers safetensors`, in this folder:

```python
{example}```

`x` is [batch, {shape}], float32, pixels in [0, 1] and not normalised; `logits` is [batch, {number}]. `weights` are
arrays by name, and others of the same shapes can take their place. For attacks there are gradients, in the images as in
the weights:

```python
{gradient}```

## Classes

{classes}

{results}
## Limits

- Robustness was looked for under the attacks above, if there are any, at their radii, on images of this data set: not
  under stronger or adaptive attacks, in other norms, under corruptions or on other data.
- It is made for {platforms}, and other platforms refuse it. Tests run such files on a CPU alone; on accelerators
  logits differ by rounding.
- Newer versions of jax promise to read such a file for six months, older ones promise nothing; after that, export the
  checkpoint again. The weights stay readable.
- There are gradients, but no second derivatives, no `vmap` and no empty batch.

## Licence

The code that made this, lt_adv, is under Apache-2.0. What may be done with the weights depends on the data set, too.
"""


def export(config: ml_collections.ConfigDict, workdir: epath.Path, command: str) -> None:
    """Write `<workdir>/export`, whole or not at all; the same checkpoint and versions give the same bytes.

    Of a report that has a name, `eval.report`, it is reports/<name>/export: the card shows the report beside it.
    The network is the one that --mode=eval evaluates: `eval.checkpoint`, averaged weights, `eval.dtype`,
    `eval.adjustment`. `command` is how the run was started, for the card. Errors: ImportError without the packages of
    the extra; ValueError where training is not finished, or the config not that of the run, or while another process
    works there; FileNotFoundError where there is no checkpoint.
    """
    if missing := [package for package in EXTRA if importlib.util.find_spec(package) is None]:
        raise ImportError(f"--mode=export needs {' and '.join(missing)}: pip install -e '.[export]'.")
    from safetensors.numpy import save

    if schema.imports(config):
        raise ValueError(
            "config.init_from names others' weights: --mode=export is for networks that were trained here."
        )
    variables, meta, split = run.load_trained(config, workdir)
    if jax.process_count() > 1:
        raise ValueError("--mode=export is done by one process: start a single one.")
    facts = run.header(config, split, meta, subset="")
    if facts["training"] != "finished":
        where = f"step {meta['step']} of {meta['total_steps']} of stage {meta['stage']}"
        raise ValueError(f"{workdir} is at {where}, not at the end of training: let it finish, then export it.")
    weights = flat(posthoc.needed(config.eval.adjustment, variables))
    shape = tuple(split.train.image.shape[1:])
    wanted = {"weights_digest": evaluation.weights_digest(variables)}
    wanted |= {name: facts[name] for name in ("model", "adjustment", "split", "dataset_digest")}
    directory = run.report_directory(config, workdir)
    contents = {
        "network.jax": bytes(serialised(stage_builder.evaluated(config, split), weights, shape)),
        "weights.safetensors": save(weights),
        "config.json": (json.dumps(config.to_dict(), indent=1, sort_keys=True) + "\n").encode(),
        "README.md": card(facts, command, split, *measured(directory, wanted)).encode(),
    }
    with workdirs.locked(workdir):
        atomic_io.replace_folder(directory / "export", contents)
    size = sum(map(len, contents.values())) / 1e6
    metric_logging.console.print(
        f"Export: {directory / 'export' / 'README.md'} says how to use it, {size:.1f} MB in all.", soft_wrap=True
    )


def flat(variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """{"params/head/kernel": array, ...}"""
    leaves = flax.traverse_util.flatten_dict(dict(variables), sep="/")
    return {name: np.ascontiguousarray(leaf) for name, leaf in leaves.items()}


def serialised(apply: Callable[..., jax.Array], weights: Mapping[str, np.ndarray], shape: Sequence[int]) -> bytearray:
    """`(weights, x [batch, *shape] float32) -> logits [batch, classes]` for `jax.export.deserialize`.

    `apply(variables, x)` is the network. For any batch of one image or more, on each of `PLATFORMS`, and with its first
    derivative in both arguments.
    """

    def network(weights: Mapping[str, jax.Array], x: jax.Array) -> jax.Array:
        return apply(flax.traverse_util.unflatten_dict(weights, sep="/"), x)

    def gradient(weights: Any, x: Any, cotangent: Any) -> Any:
        return jax.vjp(network, weights, x)[1](cotangent)

    def backward(inputs: Any, cotangent: Any) -> Any:
        # Nobody can rewrite an exported program, and attacks are loops: see convolutions.py.
        on_cpu = cpu_convolutions.rewrite_convolutions(gradient)
        return jax.lax.platform_dependent(*inputs, cotangent, cpu=on_cpu, default=gradient)

    shipped = jax.custom_vjp(network)
    shipped.defvjp(lambda *inputs: (network(*inputs), inputs), backward)
    images = jax.export.symbolic_shape(", ".join(["batch", *map(str, shape)]))
    arguments = jax.tree.map(jax.typeof, dict(weights)), jax.ShapeDtypeStruct(images, jnp.float32)
    # Where each line of code lies would go along: paths of this machine, and other bytes on another one.
    limit = jax.config.jax_traceback_in_locations_limit
    jax.config.update("jax_traceback_in_locations_limit", 0)
    try:
        return jax.export.export(jax.jit(shipped), platforms=PLATFORMS)(*arguments).serialize(vjp_order=1)
    finally:
        jax.config.update("jax_traceback_in_locations_limit", limit)


def measured(directory: epath.Path, wanted: Mapping[str, str]) -> tuple[Mapping[str, Any] | None, str]:
    """(report.json of a directory, ""), or (None, why not) where it is missing, or its header not as `wanted`."""
    path = directory / "report.json"
    if not path.exists():
        return None, "there was no report"
    try:
        summary = json.loads(path.read_text())
    except ValueError as error:
        why = atomic_io.reason(path, error, atomic_io.JSON)
        raise ValueError(f"{path} is damaged ({why}): write it again with --mode=eval.") from error
    header = summary["header"]
    if other := [name for name in wanted if header.get(name) != wanted[name]]:
        return None, f"the report that was there is of another {other[0].replace('_', ' ')}"
    return summary, ""


def card(
    facts: Mapping[str, Any], command: str, split: data.LongTailed, summary: Mapping[str, Any] | None, missing: str
) -> str:
    """The model card, in markdown: what the network is, how to use it, what was measured, and what was not."""
    commit = f" ({environment.commit()})" if environment.commit() else ""
    versions = [f"lt_adv {facts['lt_adv_version']}{commit}", f"python {facts['python_version']}"]
    versions += [f"{name} {importlib.metadata.version(name)}" for name in ("jax", "flax", "numpy")]
    lines = {
        "Method": facts["method"],
        "Network": facts["model"],
        "Adjustment after training": f"{facts['adjustment']} (it is in the logits)",
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
        results=results(summary) if summary else f"## Accuracy\n\nNot evaluated: {missing}.\n",
        platforms=", ".join(PLATFORMS),
    )


def results(summary: Mapping[str, Any]) -> str:
    """What the report says of accuracy and attacks, and on what they were measured."""
    known = evaluation.header_fields(summary)
    where = [f"- **{name}:** {known[name]}" for name in ("Images", "Device", "Versions", "Commit") if name in known]
    return "\n".join(
        [*evaluation.warning_lines(summary), *evaluation.accuracy_sections(summary), "Measured on:", "", *where, ""]
    )
