"""The report of a run for any network: one call evaluates it, looks for gradient masking and writes the report."""

import contextlib
import dataclasses
import hashlib
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import numpy.typing as npt
import rich.console
from etils import epath
from jax.sharding import Mesh

from lt_adv import data
from lt_adv.attacks import _square, checks, norms
from lt_adv.attacks._autoattack import DEPENDENCE
from lt_adv.attacks.signatures import LogitsFn
from lt_adv.data import longtail
from lt_adv.data.dataset import check_labels
from lt_adv.evaluation import _evaluate, attack_specs, masking, networks, records, report
from lt_adv.evaluation.attack_specs import AttackSpec
from lt_adv.evaluation.masking import diagnose
from lt_adv.evaluation.masking.compare import ProtocolOptions
from lt_adv.evaluation.metrics import Summary, accuracy
from lt_adv.evaluation.networks import Network
from lt_adv.evaluation.records import CLEAN, WORST, Header, Records
from lt_adv.runtime import atomic_io, distributed, environment, registry
from lt_adv.runtime.standard_attacks import standard_attacks

ATTACKS = ("pgd20", "cw20", "autoattack")
STEP = 1 / 4  # step size of the attacks by name, in units of eps
LOGITS = "clean_logits.npy"  # of the first images; with the header of the records it identifies the network
IMAGES_OF_LOGITS = 64
# What may differ between two evaluations in one working directory, apart from versions; the later report replaces the
# earlier one.
ENVIRONMENT = ("batch_size", "device", "code_digest")
DIFFERENCES = {
    "weights_digest": "other weights",
    "split_digest": "other images or labels",
    "class_names": "other classes",
    "attacks": "other attacks or radii",
    "evaluation_seed": "another seed",
}


@dataclasses.dataclass(frozen=True, repr=False)
class NetworkEvaluation:
    """The result of `evaluate_network`; `print` shows it as a table.

    Attributes:
      records: the predicted class of every image, clean and under each attack.
      summary: the content of report.json.
    """

    records: Records
    summary: Summary

    def to_dict(self) -> dict[str, Any]:
        """Returns the content of report.json: numbers, strings, lists and dicts."""
        return records.as_json(self.summary)

    def __str__(self) -> str:
        console = rich.console.Console(file=io.StringIO(), width=120)
        report.print_summary(self.summary, console)
        return console.file.getvalue().rstrip()  # type: ignore[attr-defined]

    def __repr__(self) -> str:
        shares = (f"{name} {accuracy(self.records, name):.4g}" for name in (CLEAN, WORST))
        return f"NetworkEvaluation({len(self.records)} images, accuracy: {', '.join(shares)})"


def evaluate_network(
    logits_fn: LogitsFn,
    images: npt.ArrayLike,
    labels: npt.ArrayLike,
    *,
    class_counts: Sequence[int] | None,
    eps: float,
    norm: str = "linf",
    attacks: Sequence[str] | Mapping[str, AttackSpec] = ATTACKS,
    workdir: epath.PathLike | None = None,
    class_names: Sequence[str] | None = None,
    groups: str = "thirds",
    baseline: LogitsFn | None = None,
    gradient_masking: bool = True,
    seed: int = 0,
    batch_size: int = 256,
    devices: Sequence[jax.Device] | None = None,
    model: str | None = None,
    console: rich.console.Console | None = None,
) -> NetworkEvaluation:
    """Attacks a network on test images and returns, or writes, the report that `--mode=eval` writes of a run.

    The report has clean and robust accuracy, of all classes and of head, body and tail, the worst case over the
    attacks, natural and boundary error, and whether there are signs of gradient masking.

    The result depends neither on `batch_size` nor on the devices. In a working directory an interrupted call continues
    where it stopped, and a call that is repeated only writes the report again.

    Args:
      logits_fn: any traceable function, x [b, h, w, c] in [0, 1] -> logits [b, C], in evaluation mode. Programs that
        attack a `jax.tree_util.Partial` of arrays are kept and reused for other arrays of the same shapes; those of any
        other function are freed after the call.
      images: [n, h, w, c], uint8, which is divided by 255, or floating in [0, 1], which is used as it is, in float32.
      labels: integers [n] in [0, C).
      class_counts: training images of each class [C], from which head, body and tail follow. None if the classes are
        balanced or their sizes are not known: the report then has no groups of classes.
      eps: radius, in units of the [0, 1] pixel range.
      norm: "linf", "l2" or "l1".
      attacks: names out of fgsm, pgd20, pgd100, mim20, cw20, lsa and autoattack, with steps of eps / 4; or name ->
        `{"attack": "pgd", "step_size": ..., ...}`, an entry of `config.eval.attacks`, in which `eps` and `norm` have
        the values above unless given. AutoAttack costs hundreds of PGD-20.
      workdir: directory for report.json, report.md, plots/ and the records in eval/; None writes nothing. It belongs to
        one network with one set of images and attacks.
      class_names: names of the C classes; their numbers by default.
      groups: definition of head, body and tail: "thirds", "reat", "robustlt" or "tenths".
      baseline: another network of the same images and classes, such as plain adversarial training, with which the
        diagnosis of gradient masking compares; without one it only reports what the network shows alone.
      gradient_masking: whether to diagnose gradient masking, by about fifteen PGD-20 and 1,000 queries of Square on at
        most 500 of the images.
      seed: of the attacks; image i has the key fold_in(fold_in(jax.random.key(seed), crc32(attack)), i).
      batch_size: images per batch.
      devices: all devices by default.
      model: description of the network for the report.
      console: for progress and warnings; stderr by default, `rich.console.Console(quiet=True)` for none.

    Returns:
      A `NetworkEvaluation`: `records` and `summary`.

    Raises:
      ValueError: for arguments that do not fit, a network of which no logit is finite on the first images, and a
        working directory of something else. Nothing has been written then. Images whose logits are not finite
        otherwise count as wrong, with a warning.

    Examples:
      >>> images, labels = np.zeros((20, 4, 4, 1), np.uint8), np.arange(20) % 2
      >>> images[labels == 1] = 255
      >>> logits_fn = lambda x: jnp.stack([0.5 - x.mean((1, 2, 3)), x.mean((1, 2, 3)) - 0.5], axis=-1)
      >>> options = {"attacks": ("pgd20",), "gradient_masking": False}
      >>> result = evaluate_network(logits_fn, images, labels, class_counts=(100, 10), eps=8 / 255, **options)
      >>> result.summary["metrics"]["eval/worst/accuracy"]
      1.0
    """
    console = console or rich.console.Console(stderr=True, markup=False)
    split = _split(images, labels)
    eps, batch_size = checks.number("eps", eps), checks.count("batch_size", batch_size, 1)
    checks.count("seed", seed)
    if eps <= 0:
        raise ValueError(f"eps must be above 0, in units of the [0, 1] pixel range, not {eps:g}.")
    norms.get(norm)
    specs = _specs(attacks, eps, norm)
    attack = {"eps": eps, "step_size": STEP * eps, "norm": norm}
    # Without a baseline, AutoAttack would repeat what the records have; Square shows what needs no gradient.
    protocol = masking.masking_protocol(attack, {} if baseline is None else specs)
    needs = "" if protocol["autoattack"] else _square.unsupported(norm, split.image.shape[1:])
    if gradient_masking and needs:
        raise ValueError(f"gradient_masking: Square needs {needs}. gradient_masking=False leaves these checks out.")
    network, logits = _network(logits_fn, split, "logits_fn")
    classes = logits.shape[-1]
    check_labels(split.label, len(split), classes, "labels")
    counts = _class_counts(class_counts, classes, groups)
    names = _class_names(class_names, classes)
    sides = [(network, logits)]
    if baseline is not None:
        sides.append(_network(baseline, split, "baseline"))
        if sides[1][1].shape != logits.shape:
            raise ValueError(f"The baseline has {sides[1][1].shape[-1]} classes, the network {classes}.")
    mesh = Mesh(np.array(jax.devices() if devices is None else devices), ("data",))
    key = jax.random.key(seed, impl="threefry2x32")
    entries = {"subset": "given to evaluate_network", "evaluation_seed": seed, **attack_specs.software()}
    directory = None if workdir is None else epath.Path(workdir)
    if directory is not None:
        header = attack_specs.make_header(
            entries,
            key=key,
            variables=network.variables,
            split=split,
            specs=specs,
            batch_size=batch_size,
            devices=list(mesh.devices.flat),
            class_names=names,
        )
        distributed.on_primary(lambda: _claim(directory, header, logits))
    try:
        results = _evaluate.evaluate(
            key,
            network.apply,
            network.variables,
            split,
            attacks=specs,
            batch_size=batch_size,
            directory=directory and directory / "eval",
            header=entries,
            mesh=mesh,
            class_names=names,
            console=console,
        )
        local_mesh = distributed.local(mesh)
        context: dict[str, Any] = {"class_counts": counts, "groups": groups, "commit": environment.commit()}
        context |= {} if model is None else {"model": model}
        if gradient_masking:
            context["reliability"] = _diagnose(
                sides, split, protocol, counts, groups, seed, batch_size, local_mesh, directory, console
            )
        if directory is None:
            return NetworkEvaluation(results, report.summarise_with_context(results, context))
        if split.image.shape[-1] in (1, 3):
            context["examples"] = _evaluate.main_examples(
                key,
                network.apply,
                network.variables,
                split,
                results,
                specs=specs,
                class_counts=counts,
                mesh=local_mesh,
            )
    finally:
        if not all(side.reusable for side, _ in sides):
            _free_programs()
    if not distributed.is_primary():
        return NetworkEvaluation(results, report.summarise_with_context(results, context))
    summary = report.write_report(directory, results, context)
    console.print(f"Report: {directory / 'report.md'}", highlight=False, soft_wrap=True)
    return NetworkEvaluation(results, summary)


def _split(images: npt.ArrayLike, labels: npt.ArrayLike) -> data.Split:
    """Returns the images, uint8 or float32, with labels that are integers from 0."""
    image = np.asarray(images)
    floating = jax.numpy.issubdtype(image.dtype, np.floating)
    if image.ndim != 4:
        hint = ": add the channels with images[..., None]" if image.ndim == 3 else ""
        raise ValueError(f"images must be [n, h, w, c], not of shape {image.shape}{hint}.")
    if image.dtype != np.uint8 and not floating:
        raise ValueError(f"images must be uint8, from 0 to 255, or floating, in [0, 1], not {image.dtype}.")
    label = check_labels(np.asarray(labels), len(image), np.inf, "labels")
    if floating:
        image = image.astype(np.float32, copy=False)
        low, high = image.min(), image.max()
        if not 0 <= low <= high <= 1:
            raise ValueError(
                f"Floating images must lie in [0, 1], not between {low:g} and {high:g}: scale them, or pass uint8."
            )
    return data.Split(image, label.astype(np.int32), np.arange(len(image)))


def _specs(attacks: Sequence[str] | Mapping[str, AttackSpec], eps: float, norm: str) -> dict[str, AttackSpec]:
    """Returns the attacks by name, all of them valid."""
    specs: dict[str, AttackSpec]
    if isinstance(attacks, Mapping):
        specs = {name: {"eps": eps, "norm": norm, **spec} for name, spec in attacks.items()}
    else:
        known = standard_attacks(eps, STEP * eps)
        names = (attacks,) if isinstance(attacks, str) else tuple(attacks)
        if unknown := [name for name in names if name not in known]:
            raise registry.unknown("attack", unknown[0], known)
        specs = {name: {**known[name], "norm": norm} for name in names}
    _evaluate.check_names(specs)
    for name, spec in specs.items():
        if not re.fullmatch(r"\w[\w.+-]*", str(name)):
            raise ValueError(f"The name {name!r} of an attack must be of letters, digits, '.', '_', '+' and '-'.")
        attack_specs.resolve(spec)
    return specs


def _network(logits_fn: LogitsFn, split: data.Split, what: str) -> tuple[Network, np.ndarray]:
    """Returns the network and its logits of the first images."""
    if not callable(logits_fn):
        raise ValueError(f"{what} must be a function from images to logits, not {type(logits_fn).__name__}.")
    x = diagnose.pixels(split.image[:IMAGES_OF_LOGITS])
    network = networks.from_function(logits_fn, jax.ShapeDtypeStruct(x.shape, x.dtype))

    @jax.jit
    def logits_of(variables: Any, x: jax.Array) -> jax.Array:
        return checks.check_logits(network.apply(variables, x), x)

    logits = np.asarray(logits_of(network.variables, x))
    if logits.shape[-1] < 2:
        raise ValueError(f"{what} returns logits of {logits.shape[-1]} class: there is nothing to attack.")
    if not np.isfinite(logits).all(-1).any():
        raise ValueError(f"{what}: the logits of the first {len(x)} images are not finite; check the weights.")
    return network, logits


def _class_counts(class_counts: Sequence[int] | None, classes: int, groups: str) -> tuple[int, ...] | None:
    if class_counts is None:
        return None
    counts = np.asarray(class_counts)
    if counts.shape != (classes,):
        raise ValueError(f"class_counts must have {classes} entries, one for each logit, not shape {counts.shape}.")
    if not (counts.dtype.kind in "iuf" and np.all(counts >= 1) and np.all(counts == np.trunc(counts))):
        raise ValueError("class_counts must be whole numbers from 1; pass None if the classes are balanced.")
    result = tuple(int(count) for count in counts)
    longtail.groups(result, groups)  # raises
    return result


def _class_names(class_names: Sequence[str] | None, classes: int) -> tuple[str, ...]:
    names = tuple(map(str, range(classes) if class_names is None else class_names))
    if len(names) != classes:
        raise ValueError(f"class_names must have {classes} entries, one for each logit, not {len(names)}.")
    return names


def _claim(workdir: epath.Path, header: Header, logits: np.ndarray) -> None:
    """Marks the working directory as that of this evaluation; ValueError if it holds anything else."""
    path, advice = workdir / "eval" / LOGITS, "choose another workdir"
    if workdir.exists() and not workdir.is_dir():
        raise ValueError(f"{workdir} is a file: {advice}.")
    if any((workdir / name).exists() for name in ("config.json", "checkpoints")):
        raise ValueError(f"{workdir} is the working directory of a training run: {advice}.")
    if not path.exists() and any((workdir / name).exists() for name in ("eval", "plots", "report.json", "report.md")):
        raise ValueError(f"{workdir} holds a report that is not of this function: {advice}.")
    folder = workdir / "eval" / "records"
    for directory in sorted(folder.iterdir()) if folder.exists() else ():
        stored = None
        with contextlib.suppress(ValueError):  # damaged: `evaluate` says so
            stored = records.read_header(directory)
        if stored is not None and (changed := _differences(stored, header)):
            raise ValueError(f"{workdir} holds another evaluation ({', '.join(changed)}): {advice}.")
    if path.exists():
        _check_logits(path, logits, advice)
        return
    buffer = io.BytesIO()
    np.save(buffer, logits)
    try:
        atomic_io.write_atomically(path, buffer.getvalue())
    except OSError as error:
        raise ValueError(f"{workdir} cannot be written ({error.strerror or error}): {advice}.") from error


def _differences(stored: Header, header: Header) -> list[str]:
    """Returns in words how two headers differ, apart from the environment."""
    names = {
        name
        for name in {*stored, *header}
        if name not in ENVIRONMENT and not name.endswith("_version") and stored.get(name) != header.get(name)
    }
    return [words for name, words in DIFFERENCES.items() if name in names] or sorted(names)


def _check_logits(path: epath.Path, logits: np.ndarray, advice: str) -> None:
    """Raises ValueError unless the stored logits are those of this network, up to rounding."""
    try:
        stored = np.load(io.BytesIO(path.read_bytes()), allow_pickle=False)
    except Exception as error:  # a damaged file raises many types of errors
        raise ValueError(f"{path} is damaged: remove it and eval/records, or {advice}.") from error
    scale = np.abs(logits[np.isfinite(logits)]).max()
    same = stored.shape == logits.shape and np.allclose(stored, logits, rtol=0, atol=DEPENDENCE * scale, equal_nan=True)
    if not same:
        raise ValueError(f"{path.parent.parent} holds the evaluation of another network (other logits): {advice}.")


def _diagnose(
    sides: Sequence[tuple[Network, np.ndarray]],
    split: data.Split,
    protocol: ProtocolOptions,
    counts: tuple[int, ...] | None,
    groups: str,
    seed: int,
    batch_size: int,
    mesh: Mesh,
    directory: epath.Path | None,
    console: rich.console.Console,
) -> masking.Comparison:
    """Returns the diagnosis of gradient masking, against the baseline if there are two sides."""
    sample = split.take(masking.balanced_sample(split.label))
    console.print(f"Gradient masking: diagnosis on {len(sample)} images.", highlight=False, soft_wrap=True)
    compared = [
        masking.ComparedNetwork(
            network.apply,
            network.variables,
            directory and directory / "eval",
            ["evaluate_network", hashlib.sha256(np.ascontiguousarray(logits).tobytes()).hexdigest()[:16]],
        )
        for network, logits in sides
    ]
    return masking.compare_with_baseline(
        compared[0],
        compared[1] if len(compared) > 1 else None,
        sample,
        protocol=protocol,
        groups={} if counts is None else longtail.groups(counts, groups),
        seed=seed,
        batch_size=batch_size,
        mesh=mesh,
        console=console,
    )


def _free_programs() -> None:
    """Drops the compiled programs of all networks, and with them functions that hold the arrays of a network."""
    for cached in (attack_specs._cached_jit, _evaluate._predict_and_measure, diagnose._programs):
        cached.cache_clear()
