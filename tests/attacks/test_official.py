"""AutoAttack's attacks, alone and together, against runs of the official code on two networks and their hard variants.

Logits x 10,000, where the gradient of the cross-entropy vanishes in float32; input quantised to 16 grey levels,
where every gradient is zero and only Square gets through.
"""

import os
import subprocess
import sys
from functools import partial

import jax
import numpy as np
import pytest

from lt_adv import attacks
from tests.attacks.conftest import load
from tests.attacks.official import VARIANTS
from tests.attacks.test_golden_autoattack import FAST

HEADS = ("linear", "cosine")
L1_WORST_CASE = {"linear": 0.509, "cosine": 0.474}
STANDARD = ("apgd-ce", "apgd-t", "fab-t", "square")
POINTS = {"plain": 1.0, "l1": 1.0, "scaled_1e4": 1.5, "quantised_16": 1.5}
AGREE = ("apgd-ce", "apgd-t", "fab-t")


def misses(net, variant, name, robust):
    """Returns (limit, difference) for each limit that the difference between an attack and the official one exceeds."""
    official = net.arrays[f"official.{variant}.{name}.still_correct"]
    points = 100 * abs(robust.mean() - official.mean())  # of robust accuracy, from the mean of the seeds
    missed = [("points", points)] if points > POINTS[variant] + 1e-9 else []
    # Which image breaks by accident, where the gradient is zero or nearly so, is up to the random start.
    if name in {"plain": AGREE, "l1": ("fab-t",), "scaled_1e4": AGREE[1:], "quantised_16": ()}[variant]:
        agreement = (official == robust).mean(axis=-1)
        missed += [("agreement", agreement)] if agreement.min() < 0.98 else []
    return missed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("head", "variant"),
    [
        ("linear", "plain"),
        ("cosine", "scaled_1e4"),
        *(pytest.param(*case, marks=pytest.mark.extended) for case in (("cosine", "plain"), ("linear", "scaled_1e4"))),
        *(
            pytest.param(head, variant, marks=pytest.mark.extended)
            for head in HEADS
            for variant in ("l1", "quantised_16")
        ),
    ],
)
def test_official(head, variant, tmp_path, golden):
    names = ("apgd-dlr", *STANDARD) if variant == "plain" else STANDARD
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, "-m", "tests.attacks.official", head, variant, str(tmp_path / "out.npz"), *names]
    subprocess.run(command, check=True, env=environment, timeout=1200)
    net, results = load(head), np.load(tmp_path / "out.npz")
    if variant == "l1":
        arrays = golden(f"attacks_l1_{head}")
        net.arrays = {name.replace(".plain.", ".l1."): arrays[name] for name in arrays.files}
        net.info["official"]["l1"] = {"worst_case": L1_WORST_CASE[head]}
    official = lambda name: net.arrays[f"official.{variant}.{name}"]  # noqa: E731
    for name in names:
        assert not misses(net, variant, name, results[f"{name}.robust"]), name
    worst = np.logical_and.reduce([results[f"{name}.robust"] for name in STANDARD]).mean()
    assert abs(worst - net.info["official"][variant]["worst_case"]) <= 0.005 + 1e-9
    queries = np.stack([official(f"square.queries_seed{seed}") for seed in range(3)])
    for count in (100, 500, 1000, 5000):
        survivors = [100 * np.mean((q > count), axis=-1) for q in (results["square.queries"], queries)]
        assert abs(survivors[0] - survivors[1].mean()) <= 1.5, count
    if variant not in ("plain", "l1"):
        return
    distances = official("fab-t.linf" if variant == "plain" else "fab-t.l1")
    broken = (distances > 0) & (results["fab-t.distance"] > 0) & ~results["fab-t.robust"]
    length, official_length = (np.median(lengths[broken]) for lengths in (results["fab-t.distance"], distances))
    assert abs(length / official_length - 1) <= 0.02, (length, official_length)


@pytest.mark.slow
@pytest.mark.parametrize("objective", [attacks.cross_entropy, attacks.cw_margin])
def test_comparison_rejects_pgd_20_in_place_of_any_attack(objective):
    missed = {name: [] for name in STANDARD}
    for head in HEADS:
        net = load(head)
        for variant, change in VARIANTS.items():
            if variant == "l1":
                continue
            logits_fn = change(net.logits_fn)
            attack = partial(attacks.pgd, logits_fn=logits_fn, objective=objective, num_steps=20)
            options = {"eps": net.info["eps"], "step_size": net.info["step_size"]}
            x_adv = jax.jit(attack, compiler_options=FAST)(jax.random.key(0), x=net.x, y=net.y, **options)
            robust = np.asarray((logits_fn(net.x).argmax(-1) == net.y) & (logits_fn(x_adv).argmax(-1) == net.y))
            for name in STANDARD:
                missed[name] += misses(net, variant, name, robust)
    assert all(missed.values()), missed
