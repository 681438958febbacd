"""Attack entries of a config: their options, their compiled functions, and the header that records them."""

import functools
import hashlib
import importlib.metadata
import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lt_adv
from lt_adv import attacks, data
from lt_adv.attacks._autoattack import VERSIONS, attacks_of
from lt_adv.data.dataset import check_labels
from lt_adv.evaluation import records
from lt_adv.evaluation.records import Header
from lt_adv.runtime import environment, registry

Variables = Any  # pytree of arrays
Apply = Callable[[Variables, jax.Array], jax.Array]  # (variables, x [b, h, w, c] in [0, 1]) -> logits [b, classes]
Attack = Callable[[jax.Array, Variables, jax.Array, jax.Array], jax.Array]  # (keys, variables, x, y) -> x_adv
AttackSpec = Mapping[str, Any]  # {"attack": "pgd", "eps": ..., **options}, an entry of config.eval.attacks

NAMES = ("fgsm", "pgd", "mim", "cw", "autoattack")
# Arguments of attacks that the evaluation sets.
NOT_OPTIONS = ("x_init", "targets", "bounds", "batch_size", "num_queries", "resume", "progress", "devices")
SINGLE_RUN = {"num_restarts": 1, "return_best": False}


def resolve(spec: AttackSpec) -> tuple[str, dict[str, Any]]:
    """Returns the attack's name and its options with defaults, from `{"attack": "pgd", "eps": ..., ...}`.

    `logit_scale` s attacks CE(s z); LSA is PGD-20 with s = 10. An option that is None gets its default.

    Raises:
      ValueError: for an unknown attack or option or a missing option; the message lists the valid ones.
    """
    options = {name: value for name, value in spec.items() if value is not None}
    name = options.pop("attack", None)
    if name == "n_fgsm":
        raise ValueError(
            "n_fgsm is an attack for training: its result lies outside the ball of radius eps, so that the accuracy "
            "under it is not the robust accuracy at eps. Evaluate with pgd or autoattack."
        )
    if name not in NAMES:
        raise registry.unknown("attack", name, NAMES)
    parameters = {
        p.name: p.default
        for p in inspect.signature(getattr(attacks, name)).parameters.values()
        if p.kind is inspect.Parameter.KEYWORD_ONLY and p.name not in NOT_OPTIONS
    }
    scalable = "objective" in parameters
    parameters.pop("objective", None)
    choices = [*parameters, "logit_scale"] if scalable else list(parameters)
    for option in options:
        if option not in choices:
            raise registry.unknown(f"option of {name}", option, choices)
    defaults = {option: value for option, value in parameters.items() if value is not inspect.Parameter.empty}
    missing = [option for option in parameters if option not in defaults and option not in options]
    if missing:
        raise ValueError(f"The attack {name!r} needs {', '.join(missing)}, in units of the [0, 1] pixel range.")
    options = defaults | options
    # Older records do not name these options, whose defaults are left out so that they stay valid.
    options = {option: value for option, value in options.items() if SINGLE_RUN.get(option, ...) != value}
    if options.get("norm", "linf") == "linf" and not 0 <= options["eps"] <= 1:
        raise ValueError(
            f"eps {options['eps']!r} of {name!r} is not in the [0, 1] pixel range; is {options['eps']}/255 meant?"
        )
    if name == "autoattack":
        _check_version(options["version"])
    return name, options


def _check_version(version: object) -> None:
    if not isinstance(version, (str, tuple, list)) or isinstance(version, str) and version not in VERSIONS:
        raise registry.unknown("version of autoattack", version, set(VERSIONS) - {"rand"})
    attacks_of(version)  # raises
    if version == "rand":
        raise ValueError(
            "The version 'rand' of autoattack is for randomised networks, which this evaluation does not support; use "
            "'standard' or 'plus'."
        )


def needs_all_images(spec: AttackSpec) -> bool:
    """Whether the attack runs on all images at once instead of batch by batch, as AutoAttack does."""
    return resolve(spec)[0] == "autoattack"


@functools.lru_cache(maxsize=64)
def _cached_jit(apply: Apply, name: str, options: tuple[tuple[str, Any], ...]) -> Attack:
    keywords = dict(options)
    scale = keywords.pop("logit_scale", 1.0)
    if scale != 1.0:
        keywords["objective"] = functools.partial(attacks.cross_entropy, logit_scale=scale)
    return attacks.jit(getattr(attacks, name), apply, **keywords)


def jit_attack(apply: Apply, spec: AttackSpec) -> Attack:
    """Returns the jitted attack `f(key, variables, x, y) -> x_adv`, cached by `apply` and options."""
    name, options = resolve(spec)
    return _cached_jit(apply, name, tuple(sorted(options.items())))


def describe(spec: AttackSpec) -> dict[str, Any]:
    """Returns the header entry of an attack: every option; radius and step also in /255 (0.031 is not 8/255)."""
    name, options = resolve(spec)
    # Twelve digits hide the rounding of the product (0.03 * 255 = 7.6499999999999995); eps itself stays exact.
    lengths = {f"{k}_255": float(f"{options[k] * 255:.12g}") for k in ("eps", "step_size") if k in options}
    return {"attack": name} | options | lengths


def weights_digest(variables: Variables) -> str:
    """Returns a digest of the names, types and bytes of all arrays."""
    sha256 = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
        is_key = jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key)
        leaf = np.asarray(jax.random.key_data(leaf) if is_key else leaf)
        sha256.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}".encode())
        sha256.update(np.ascontiguousarray(leaf).view(np.uint8).data)
    return sha256.hexdigest()[:16]


def software() -> dict[str, str]:
    """Returns the entries of a header on the code that evaluates."""
    return {
        "lt_adv_version": lt_adv.__version__,
        "code_digest": environment.code_digest(),
        "python_version": sys.version.partition(" ")[0],
    }


def split_digest(split: data.Split) -> str:
    """Returns a digest of the images, labels and indices of a split."""
    sha256 = hashlib.sha256()
    columns: tuple[Any, ...] = (split.image, split.label, split.index)
    for column in columns:
        if not isinstance(column, np.ndarray):  # images that are not yet decoded
            sha256.update(column.digest.encode())
            continue
        sha256.update(np.ascontiguousarray(column).view(np.uint8).data)
    return sha256.hexdigest()[:16]


def make_header(
    entries: Header,
    *,
    key: jax.Array,
    variables: Variables,
    split: data.Split,
    specs: Mapping[str, AttackSpec],
    batch_size: int,
    devices: list[jax.Device],
    class_names: tuple[str, ...],
) -> dict[str, Any]:
    """Returns the header of the records: the caller's `entries` and those computed here.

    An entry must not change between two starts of the same evaluation, as a time would: the records of another header
    are in another directory.

    Raises:
      ValueError: for labels that are not classes, and for `entries` that are computed here.
    """
    check_labels(split.label, len(split.image), len(class_names), "The images to evaluate on")
    computed = {
        "attacks": {name: describe(spec) for name, spec in specs.items()},
        "key": np.asarray(jax.random.key_data(key)),
        "images": len(split.label),
        "images_per_class": np.bincount(split.label, minlength=len(class_names)),
        "batch_size": batch_size,
        "class_names": class_names,
        "weights_digest": weights_digest(variables),
        "split_digest": split_digest(split),
        "device": f"{len(devices)} x {devices[0].device_kind}",
        "jax_version": jax.__version__,
        "numpy_version": importlib.metadata.version("numpy"),
    }
    clash = sorted(set(computed) & set(entries))
    if clash:
        raise ValueError(f"The evaluation computes these header entries; leave them out: {', '.join(clash)}.")
    return records.as_json(computed | dict(entries))
