"""What holds for every public attack, in every norm that it supports, on any network.

The programs have fixed shapes: each is compiled once, and every property calls it with other values.
"""

import functools
import inspect
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from lt_adv import attacks

BATCH, SHAPE, CLASSES = 8, (5, 5, 1), 4  # one image on each device; the smallest image of Square in L2 and L1
LOW, HIGH = BOUNDS = (-0.5, 1.25)
NORMS = ("linf", "l2", "l1")
RADIUS = {"linf": 0.3, "l2": 1.2, "l1": 4.0}  # which break most images


class Entry(NamedTuple):
    """How to call an attack with few steps, and what it promises."""

    call: Callable  # (key, logits_fn, x, y, *, eps, norm, bounds, ...) -> x_adv, or (x_adv, distance)
    norms: tuple[str, ...] = NORMS
    has_radius: bool = True
    reach: float = 1.0  # how far x_adv may lie from x, in radii
    draws: bool = True  # whether the result depends on the key
    keeps_wrong: bool = True  # whether an image that is classified wrongly is returned unchanged
    moves_only_to_wrong: bool = False  # whether an image that it does not break is returned unchanged


def ascent(attack, **options):
    """An attack whose steps are half of the radius."""
    return lambda *args, eps, **more: attack(*args, eps=eps, step_size=eps / 2, num_steps=3, **options, **more)


def only_linf(attack):
    return lambda *args, norm, **options: attack(*args, **options)


MINIMUM_NORM = {"has_radius": False, "draws": False, "moves_only_to_wrong": True}  # DDN and FMN draw at zero gradients
ENTRIES = {
    "fgsm": Entry(attacks.fgsm, draws=False, keeps_wrong=False),
    "fgsm_rs": Entry(only_linf(attacks.fgsm_rs), ("linf",), keeps_wrong=False),
    "n_fgsm": Entry(only_linf(attacks.n_fgsm), ("linf",), keeps_wrong=False, reach=3.0),  # noise 2 eps, step eps
    "pgd": Entry(ascent(attacks.pgd), keeps_wrong=False),
    "mim": Entry(ascent(attacks.mim, num_restarts=2), keeps_wrong=False),
    "cw": Entry(ascent(attacks.cw, return_best=True), keeps_wrong=False),
    "apgd": Entry(partial(attacks.apgd, num_steps=6, num_restarts=2)),
    "apgd_targeted": Entry(partial(attacks.apgd_targeted, num_steps=6, num_targets=2)),
    "fab": Entry(partial(attacks.fab, num_steps=4, num_restarts=2), moves_only_to_wrong=True),
    "fab_targeted": Entry(
        partial(attacks.fab_targeted, num_steps=4, num_targets=2), draws=False, moves_only_to_wrong=True
    ),
    "square": Entry(partial(attacks.square, num_queries=25)),
    "ddn": Entry(partial(attacks.ddn, num_steps=15), ("l2",), **MINIMUM_NORM),
    "fmn": Entry(partial(attacks.fmn, num_steps=15), **MINIMUM_NORM),
    "deepfool": Entry(partial(attacks.deepfool, num_steps=15), ("linf", "l2"), **MINIMUM_NORM),
    "minimum_norm": Entry(partial(attacks.minimum_norm(attacks.fab), num_steps=6), **MINIMUM_NORM),
}
TARGETED = ("fgsm", "pgd", "mim", "cw", "apgd", "apgd_targeted", "fab", "ddn", "fmn", "deepfool", "minimum_norm")
ELSEWHERE = {"autoattack", "robustness_curve"}  # run on the host: test_autoattack.py, test_robustness_curve.py
CASES = [(name, norm) for name, entry in ENTRIES.items() for norm in entry.norms]
# A norm for each attack, each norm for several attacks: for properties that do not depend on the geometry.
ONE_NORM = [(name, entry.norms[i % len(entry.norms)]) for i, (name, entry) in enumerate(ENTRIES.items())]
every_case = pytest.mark.parametrize(("name", "norm"), CASES)
every_attack = pytest.mark.parametrize(("name", "norm"), ONE_NORM)


def test_every_public_attack_and_norm_has_an_entry():
    public = {getattr(attacks, name): name for name in attacks.__all__}
    parameters = {name: inspect.signature(function).parameters for function, name in public.items()}
    are_attacks = {name for name in public.values() if list(parameters[name])[:4] == ["key", "logits_fn", "x", "y"]}
    assert are_attacks | {"minimum_norm"} == set(ENTRIES) | ELSEWHERE
    assert {name for name in are_attacks if "targets" in parameters[name]} | {"minimum_norm"} == set(TARGETED)
    for name in are_attacks - ELSEWHERE:
        entry = ENTRIES[name]
        assert entry.has_radius == ("eps" in parameters[name])
        assert "norm" in parameters[name] or entry.norms == ("linf",)
        for norm in set(NORMS) - set(entry.norms) if "norm" in parameters[name] else ():
            with pytest.raises(ValueError, match="Unknown norm"):
                entry.call(jax.random.key(0), network, np.zeros((1, *SHAPE)), np.zeros(1, int), norm=norm)
    assert {norm for _, norm in ONE_NORM} == set(NORMS)


# The network: 232 multiplications


def weights(dtype=np.float32):
    rng = np.random.default_rng(1)
    arrays = {"hidden": rng.normal(size=(25, 8)) / 2, "out": rng.normal(size=(8, CLASSES)), "derivative": np.ones(25)}
    return {name: array.astype(dtype) for name, array in arrays.items()}


@jax.custom_vjp
def with_derivative(x, derivative):
    """Returns x. Its gradient is multiplied by `derivative`, so that an entry may be zero, infinite or NaN."""
    return x


with_derivative.defvjp(
    lambda x, derivative: (x, derivative), lambda derivative, g: (g * derivative, jnp.zeros_like(derivative))
)


def product(x, w):
    """x @ w, summed in the same order for every batch size."""
    return jnp.sum(x[:, :, None] * w, axis=1)


def apply(weights, x, dtype=None):
    x = with_derivative(x.reshape(len(x), -1), weights["derivative"])
    dtype = dtype or x.dtype
    hidden = jnp.tanh(product(x.astype(dtype), weights["hidden"].astype(dtype)))
    return product(hidden, weights["out"].astype(dtype))


network = partial(apply, weights())


def logits(x):
    """Computes the logits in float64."""
    w = weights(np.float64)
    return np.tanh(np.asarray(x, np.float64).reshape(len(x), -1) @ w["hidden"]) @ w["out"]


def margin(x, y, targets=None):
    """How far the prediction is beyond the boundary: of the best wrong class, or of the target."""
    z, rows, goal = logits(x), np.arange(len(x)), y if targets is None else targets
    others = np.where(np.arange(CLASSES) == goal[:, None], -np.inf, z).max(1)
    return (others - z[rows, goal]) * (1 if targets is None else -1)


def images(seed, border=False, dtype=np.float32):
    """Images of which a part of the pixels, or all of them, are at the bounds."""
    spread = np.random.default_rng(seed).uniform(-0.1, 1.1, size=(BATCH, *SHAPE))
    unit = np.round(spread) if border else spread
    return (LOW + (HIGH - LOW) * np.clip(unit, 0, 1)).astype(dtype)


def labels(x, wrong=False):
    """The predictions; another class where `wrong`."""
    return ((logits(x).argmax(1) + wrong) % CLASSES).astype(np.int32)


def distance(x_adv, x, norm):
    delta = np.abs(np.asarray(x_adv, np.float64) - x).reshape(len(x), -1)
    return {"linf": delta.max(1), "l2": np.sqrt((delta**2).sum(1)), "l1": delta.sum(1)}[norm]


# The programs


def attack(name, norm, targeted=False, dtype=None):
    """Returns f(weights, keys, x, y, eps, targets) -> (x_adv, how far it may lie from x at most)."""
    entry = ENTRIES[name]

    def f(weights, keys, x, y, eps, targets):
        options = {"targets": targets} if targeted else {}
        options |= {"eps": eps} if entry.has_radius else {}
        logits_fn = partial(apply, weights, dtype=dtype)
        result = entry.call(keys, logits_fn, x, y, norm=norm, bounds=BOUNDS, **options)
        return (result, entry.reach * eps) if entry.has_radius else tuple(result)

    return f


@functools.cache
def compiled(name, norm, targeted=False, dtype=None):
    return jax.jit(attack(name, norm, targeted, dtype))


def run(name, norm, x, y, eps=None, *, keys=0, targets=None, network=None, dtype=None):
    """Returns x_adv and how far it may lie from x, in NumPy; `keys` are one key for each image, or a seed."""
    f = compiled(name, norm, targets is not None, dtype)
    eps = np.broadcast_to(np.asarray(RADIUS[norm] if eps is None else eps, x.dtype), (BATCH,))
    keys = jax.random.split(jax.random.key(keys), BATCH) if isinstance(keys, int) else keys
    targets = y if targets is None else targets
    return tuple(np.asarray(a) for a in f(network or weights(x.dtype), keys, x, y, eps, targets))


def check(name, norm, x, y, x_adv, limit, targets=None, tolerance=1e-6):
    """Asserts the promises on one result of a network whose logits are finite."""
    check_ball_and_box(name, norm, x, x_adv, limit, tolerance)
    entry, before, after = ENTRIES[name], margin(x, y, targets), margin(x_adv, y, targets)
    same = (x_adv == x).all((1, 2, 3))
    if entry.keeps_wrong:
        assert same[before > 1e-5].all()
    if entry.moves_only_to_wrong:
        assert (after[~same] > -1e-5).all()
    if not entry.has_radius:
        found = np.isfinite(limit)
        np.testing.assert_allclose(limit[found], distance(x_adv, x, norm)[found], rtol=10 * tolerance, atol=tolerance)
        assert (limit[before > 1e-5] == 0).all() and (limit[before < -1e-5] > 0).all()
        assert same[~found].all() and (after[~found] < 1e-5).all()


def check_ball_and_box(name, norm, x, x_adv, limit, tolerance=1e-6):
    assert x_adv.dtype == limit.dtype == x.dtype and x_adv.shape == x.shape and limit.shape == (BATCH,)
    assert np.isfinite(x_adv).all() and (x_adv >= LOW).all() and (x_adv <= HIGH).all()
    assert (distance(x_adv, x, norm) <= limit * (1 + 10 * tolerance) + tolerance).all()


seeds = st.integers(0, 2**31 - 1)
radii = st.lists(st.floats(0, 2, width=32), min_size=BATCH, max_size=BATCH)


@every_case
@settings(max_examples=8, deadline=None)
@given(seed=seeds, radii=radii, border=st.booleans(), wrong=st.lists(st.booleans(), min_size=BATCH, max_size=BATCH))
def test_in_the_ball_and_the_box(name, norm, seed, radii, border, wrong):
    """Images that are classified wrongly, and those without a perturbation, are unchanged; distances are right."""
    x = images(seed, border)
    y, eps = labels(x, np.array(wrong)), RADIUS[norm] * np.array(radii, np.float32)
    x_adv, limit = run(name, norm, x, y, eps, keys=seed)
    check(name, norm, x, y, x_adv, limit)


@every_case
@settings(max_examples=5, deadline=None)
@given(seed=seeds, others=seeds, kept=st.integers(0, BATCH - 1))
def test_an_example_depends_on_its_own_key_and_on_no_other_example(name, norm, seed, others, kept):
    """Bit for bit, with other images, labels, radii and keys beside it. If nothing is drawn, its key has no effect."""
    keys, other_keys = (jax.random.split(jax.random.key(s), BATCH) for s in (seed, others + 1))
    x, other_x = images(seed), images(others, border=True)
    y = labels(x)
    first = run(name, norm, x, y, RADIUS[norm], keys=keys)
    again = run(name, norm, x, y, RADIUS[norm], keys=keys)
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)

    is_kept = np.arange(BATCH) == kept
    mixed_x, mixed_eps = np.where(is_kept[:, None, None, None], x, other_x), np.where(is_kept, 1, 0.1) * RADIUS[norm]
    mixed_y = np.where(is_kept, y, labels(other_x, wrong=True)).astype(np.int32)
    mixed = run(name, norm, mixed_x, mixed_y, mixed_eps, keys=jnp.where(is_kept, keys, other_keys))
    np.testing.assert_array_equal(mixed[0][kept], first[0][kept])
    if not ENTRIES[name].draws:
        np.testing.assert_array_equal(run(name, norm, x, y, RADIUS[norm], keys=other_keys)[0], first[0])


@pytest.mark.parametrize(("name", "norm"), [case for case in CASES if case[0] != "fab"])
def test_the_key_decides(name, norm):
    """At small radii, where an image is not broken at once. What FAB draws seldom changes the nearest point."""
    x = images(0)
    results = [run(name, norm, x, labels(x), RADIUS[norm] / 4, keys=seed)[0] for seed in (1, 2)]
    assert (results[0] != results[1]).any() == ENTRIES[name].draws


@every_case
def test_same_under_transformations(name, norm):
    """One image on each of eight devices is attacked as in a batch of eight, and two keys at once as one by one."""
    x, y, eps = images(0), labels(images(0), np.arange(BATCH) == 3), np.linspace(0.1, 1, BATCH) * RADIUS[norm]
    two_keys = jnp.stack([jax.random.split(jax.random.key(seed), BATCH) for seed in (1, 2)])
    expected = [run(name, norm, x, y, eps, keys=keys) for keys in two_keys]
    rows = (x, y, eps.astype(x.dtype), y)
    f, replicated, per_image = attack(name, norm), P(), P("data")
    mesh = Mesh(np.array(jax.devices()), ("data",))

    def over_devices(f, keys=per_image, out=per_image):
        specs = (replicated, keys, *[per_image] * len(rows))
        return jax.jit(jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=out))

    def compare(result, expected):
        for actual, reference in zip(result, expected, strict=True):
            np.testing.assert_array_equal(np.asarray(actual).reshape(reference.shape), reference)

    over_keys = jax.vmap(f, (None, 0, None, None, None, None))
    both = [np.stack(pair) for pair in zip(*expected, strict=True)]
    if (name, norm) not in ONE_NORM:  # two transformations at once
        compare(over_devices(over_keys, P(None, "data"), P(None, "data"))(weights(), two_keys, *rows), both)
        return
    compare(over_devices(f)(weights(), two_keys[0], *rows), expected[0])
    one_each = jax.tree.map(lambda a: a.reshape(BATCH, 1, *a.shape[1:]), rows)
    results = jax.pmap(over_keys, in_axes=(None, *[0] * 5))(weights(), two_keys.T[..., None], *one_each)
    compare([np.swapaxes(result, 0, 1) for result in results], both)


@every_case
def test_strength_grows_with_the_radius(name, norm):
    """On average over 32 images. Minimum-norm attacks find a point for most of them."""
    batches, small, large = [images(seed) for seed in range(4)], [], []
    for seed, x in enumerate(batches):
        y = labels(x)
        if not ENTRIES[name].has_radius:
            _, found = run(name, norm, x, y, keys=seed)
            large.append(np.where(np.isfinite(found), 1.0, -1.0))
            small.append(np.full(BATCH, -1.0))
            continue
        for scale, values in ((0.05, small), (1.0, large)):
            values.append(margin(run(name, norm, x, y, scale * RADIUS[norm], keys=seed)[0], y))
    small, large = np.concatenate(small), np.concatenate(large)
    assert small.mean() < large.mean()
    assert (small > 0).sum() + 8 <= (large > 0).sum(), ((small > 0).sum(), (large > 0).sum())


def changed(array, values, at=0):
    """Returns the weights of the network, of which three are these values."""
    result = weights()
    result[array].reshape(-1)[at : at + 3] = values
    return result


@every_case
@settings(max_examples=4, deadline=None)
@given(seed=seeds, at=st.integers(0, 22))
def test_gradient_entries_that_are_not_finite_count_as_zero(name, norm, seed, at):
    """Bit for bit: the search goes on by the other entries."""
    x = images(seed)
    results = [
        run(name, norm, x, labels(x), keys=seed, network=changed("derivative", values, at))
        for values in ([np.nan, np.inf, -np.inf], 0)
    ]
    for a, b in zip(*results, strict=True):
        np.testing.assert_array_equal(a, b)
    check(name, norm, x, labels(x), *results[0])


@every_case
@pytest.mark.parametrize("values", [np.nan, [np.inf, -np.inf, 1.0], 3e38])
def test_finite(name, norm, values):
    """Points stay finite, in the ball and in the box, where logits are not finite or hardly representable."""
    x = images(0)
    x_adv, limit = run(name, norm, x, labels(x), network=changed("out", values))
    check_ball_and_box(name, norm, x, x_adv, limit)
    if np.isnan(values).any() and ENTRIES[name].keeps_wrong:  # without logits an image counts as wrong
        np.testing.assert_array_equal(x_adv, x)
        assert ENTRIES[name].has_radius or (limit == 0).all()


SCALE_FREE = ("cw", "apgd_targeted", "fab", "fab_targeted", "square", "fmn", "deepfool", "minimum_norm")


@pytest.mark.parametrize(("name", "norm"), [case for case in CASES if case[0] in SCALE_FREE])
def test_gradients_whose_squares_overflow(name, norm):
    """As many images are broken as at an ordinary scale; a cross-entropy would be saturated."""
    huge, broken = weights(), [0, 0]
    huge["out"] *= 1e36
    for seed in range(2):
        x = images(seed)
        for i, network in enumerate((None, huge)):
            broken[i] += (margin(run(name, norm, x, labels(x), keys=seed, network=network)[0], labels(x)) > 0).sum()
    assert broken[1] >= broken[0] - 2 > 2, broken


@pytest.mark.parametrize(("name", "norm"), [case for case in CASES if case[0] in TARGETED])
def test_targets_are_hit_no_less_often_than_by_chance(name, norm):
    """Than by the attack without targets, and more often than clean images lie in the class by accident."""
    hits, by_chance, reachable = 0, 0, 0
    for seed in range(4):
        x = images(seed)
        y = labels(x)
        targets = np.random.default_rng(seed).integers(0, CLASSES, BATCH).astype(np.int32)
        x_adv, limit = run(name, norm, x, y, keys=seed, targets=targets)
        check(name, norm, x, y, x_adv, limit, targets)
        hits += (margin(x_adv, y, targets) > 0).sum()
        by_chance += (margin(run(name, norm, x, y, keys=seed)[0], y, targets) > 0).sum()
        reachable += (margin(x, y, targets) > 0).sum()
    assert hits >= by_chance and hits > reachable, (hits, by_chance, reachable)


@every_attack
def test_float64(name, norm):
    """The rounding of the result is that of float64; wrong points are wrong to the last bit."""
    with jax.enable_x64(True):
        x = images(0, dtype=np.float64)
        y = labels(x, np.arange(BATCH) == 2)
        x_adv, limit = run(name, norm, x, y)
    check(name, norm, x, y, x_adv, limit, tolerance=1e-13)
    if ENTRIES[name].moves_only_to_wrong:
        assert (margin(x_adv, y)[(x_adv != x).any((1, 2, 3))] > 0).all()
    assert (margin(x_adv, y) > 0).sum() >= 4


FAB = ("fab", "fab_targeted", "minimum_norm")


@every_attack
def test_networks_in_bfloat16(name, norm):
    """Nearly as many images are broken as for the network in float32, judged by the network itself.

    FAB is weaker, as its documentation says: the rounding of the logits hides the boundary that it searches.
    """
    broken = {jnp.bfloat16: 0, None: 0}
    for seed in range(4):
        x = images(seed)
        y = labels(x)
        for dtype in broken:
            x_adv, limit = run(name, norm, x, y, keys=seed, dtype=dtype)
            check_ball_and_box(name, norm, x, x_adv, limit)
            if ENTRIES[name].moves_only_to_wrong:  # to the boundary, where the rounding depends on the program
                wrong = (x_adv != x).any((1, 2, 3)) | (np.asarray(network(x, dtype=dtype).argmax(1)) != y)
            else:
                wrong = np.asarray(network(x_adv, dtype=dtype).argmax(1)) != y
            broken[dtype] += wrong.sum()
    share = 0.75 if name in FAB else 0.875
    assert broken[jnp.bfloat16] >= share * broken[None] > 0, broken
