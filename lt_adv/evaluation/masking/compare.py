"""Diagnostics of a network and, if there is one, of a baseline on the same images, and the verdict on gradient masking.

Diagnostics take minutes, so they are stored and reused for the same code, images, weights and protocol.
"""

import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple, NotRequired, TypedDict

import jax
import numpy as np
import rich.console
from etils import epath
from jax.sharding import Mesh

from lt_adv import data
from lt_adv.evaluation.attack_specs import (
    Apply,
    AttackSpec,
    Variables,
    needs_all_images,
    split_digest,
    weights_digest,
)
from lt_adv.evaluation.masking import diagnose
from lt_adv.evaluation.masking.verdict import DiagnosticsSummary, Verdict, masking_verdict, summarise_diagnostics
from lt_adv.evaluation.records import digest
from lt_adv.runtime import atomic_io, environment

NUM_STEPS = 20  # of PGD and CW


class ComparedNetwork(NamedTuple):
    """A network under comparison, and where its diagnostics are stored."""

    apply: Apply
    variables: Variables
    directory: epath.Path | None  # diagnostics are stored in its folder gradient_masking; None stores nothing
    identity: object  # JSON: what `apply` depends on apart from code and variables; part of the name of the file


class ProtocolOptions(TypedDict):
    """The options of `run_diagnostics` that an evaluation determines."""

    eps: float
    step_size: float
    num_steps: int
    queries: int
    norm: str
    autoattack: str | Sequence[str]


class Comparison(TypedDict):
    """The result of `compare_with_baseline`."""

    verdict: Verdict
    protocol: diagnose.Protocol
    network: DiagnosticsSummary
    baseline: NotRequired[DiagnosticsSummary]
    baseline_run: NotRequired[str]  # the baseline's working directory, for the report


def masking_protocol(attack: AttackSpec, specs: Mapping[str, AttackSpec]) -> ProtocolOptions:
    """Returns the options of `run_diagnostics` for an evaluation with the attacks `specs`.

    `attack` gives eps, step_size and norm. AutoAttack replaces Square if it is one of `specs`.
    """
    versions = [spec.get("version") or "standard" for spec in specs.values() if needs_all_images(spec)]
    return {
        "eps": attack["eps"],
        "step_size": attack["step_size"],
        "num_steps": NUM_STEPS,
        "queries": diagnose.QUERIES,
        "norm": attack.get("norm") or "linf",
        "autoattack": versions[0] if versions else (),
    }


def compare_with_baseline(
    network: ComparedNetwork,
    baseline: ComparedNetwork | None,
    images: data.Split,
    *,
    protocol: ProtocolOptions,
    groups: Mapping[str, Sequence[int] | np.ndarray],
    seed: int,
    batch_size: int,
    mesh: Mesh,
    console: rich.console.Console,
) -> Comparison:
    """Returns the diagnostics of both networks and the verdict on gradient masking.

    Args:
      network, baseline: the two networks, of the same classes and image size. Without a baseline (None) the verdict is
        on the network alone, as that of `masking_verdict`.
      images: the images for both; `diagnose.balanced_sample` chooses them.
      protocol: the result of `masking_protocol`.
      groups: name -> classes; gains are also tested on the images of each group.
      seed: of the attacks.
      batch_size, mesh: as in `run_diagnostics`.
      console: prints a warning where diagnostics cannot be stored.
    """
    diagnostics, baseline_diagnostics = (
        side
        and stored_diagnostics(
            side, baseline, images, protocol=protocol, seed=seed, batch_size=batch_size, mesh=mesh, console=console
        )
        for side in (network, baseline)
    )
    assert diagnostics is not None
    comparison: Comparison = {
        "verdict": masking_verdict(
            diagnostics, baseline_diagnostics, {name: classes for name, classes in groups.items() if len(classes)}
        ),
        "protocol": diagnostics["protocol"],
        "network": summarise_diagnostics(diagnostics),
    }
    if baseline_diagnostics is not None:
        comparison["baseline"] = summarise_diagnostics(baseline_diagnostics)
    return comparison


def stored_diagnostics(
    network: ComparedNetwork,
    baseline: ComparedNetwork | None,
    images: data.Split,
    *,
    protocol: ProtocolOptions,
    seed: int,
    batch_size: int,
    mesh: Mesh,
    console: rich.console.Console,
) -> diagnose.Diagnostics:
    """Returns the diagnostics of a network, read from its directory or computed and stored there.

    The baseline provides the transfer attack. A damaged file is computed again; a directory that cannot be written gets
    a warning.
    """
    sides = [network] if baseline is None else [network, baseline]
    key = {
        "code": environment.code_digest(),
        "jax": jax.__version__,
        "device": str(jax.devices()),
        "seed": seed,
        "options": protocol,
        "images": split_digest(images),
        "weights": [weights_digest(side.variables) for side in sides],
        "networks": [side.identity for side in sides],
    }
    path = network.directory and network.directory / "gradient_masking" / f"{digest(key)}.json"
    if path and (stored := _read(path)):
        return stored
    diagnostics = diagnose.run_diagnostics(
        jax.random.key(seed, impl="threefry2x32"),
        network.apply,
        network.variables,
        np.asarray(images.image),
        images.label,
        transfer=baseline and (baseline.apply, baseline.variables),
        mesh=mesh,
        batch_size=batch_size,
        **protocol,
    )
    if path:
        try:
            content = {"digest": digest(diagnostics), "diagnostics": diagnostics}
            atomic_io.write_atomically(path, json.dumps(content))
        except OSError as error:  # such as a baseline of another user
            console.print(f"warning: {path} cannot be written ({error.strerror}).", highlight=False, soft_wrap=True)
    return diagnostics


def _read(path: epath.Path) -> diagnose.Diagnostics | None:
    """Returns stored diagnostics; None if there are none, or if the file is damaged."""
    try:
        stored = json.loads(path.read_text())
        return stored["diagnostics"] if digest(stored["diagnostics"]) == stored["digest"] else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
