"""Invalid labels, logits, images and options are refused in one line, before anything is computed."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lt_adv import attacks, losses
from lt_adv.attacks import checks
from tests.attacks.few_steps import ATTACKS, KEY, X, Y, network, wrong

# Labels, logits, images and options


BAD_LABELS = {
    "a column": Y[:, None],
    "a row": Y[None, :],
    "one-hot": jax.nn.one_hot(Y, 4),
    "floating": Y.astype(jnp.float32),
    "bool": Y > 0,
    "of another batch": Y[:5],
    "a scalar": Y[0],
    "negative": Y - 1,
    "too large": Y + 1,
}


@pytest.mark.parametrize("kind", BAD_LABELS)
@pytest.mark.parametrize("name", [*ATTACKS, "autoattack"])
def test_attacks_refuse_labels(name, kind):
    attack = ATTACKS.get(name, partial(attacks.autoattack, version=("apgd-ce",)))
    with pytest.raises(ValueError, match="labels"):
        attack(KEY, network, X, BAD_LABELS[kind], eps=0.1)


LOSSES = {
    **{
        name: partial(getattr(losses, name), class_counts=[4, 3, 2, 1])
        for name in ("cross_entropy", "balanced_softmax", "logit_adjustment", "ldam", "robal_margin", "focal")
    },
    "class_dependent_temperature": partial(losses.class_dependent_temperature, class_counts=[4, 3, 2, 1]),
    "focal_sigmoid": partial(losses.focal, activation="sigmoid"),
    "mart": lambda z, y: losses.mart(z, 2 * z, y),
    "tail_alignment": partial(losses.tail_alignment, class_counts=[4, 3, 2, 1], tail=np.arange(4) > 1),
    "tail_alignment_released": partial(
        losses.tail_alignment_released, class_counts=[4, 3, 2, 1], tail=np.arange(4) > 1
    ),
    "hierarchical_equalisation": lambda z, y: losses.hierarchical_equalisation(z[:, 0], y, num_classes=4),
    **{f"attacks.{name}": getattr(attacks, name) for name in ("cross_entropy", "cw_margin", "logit_margin", "dlr")},
    "attacks.stable_cross_entropy": attacks.stable_cross_entropy,
    "attacks.targeted_dlr": lambda z, y: attacks.targeted_dlr(z, Y, y),
    "attacks.targeted_logit_margin": lambda z, y: attacks.targeted_logit_margin(z, y, Y),
}


@pytest.mark.parametrize("kind", BAD_LABELS)
@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_objectives_refuse_labels(name, kind):
    with pytest.raises(ValueError, match="labels"):
        LOSSES[name](network(X), BAD_LABELS[kind])
    if kind not in ("negative", "too large"):  # whose values are not known inside a trace
        with pytest.raises(ValueError, match="labels"):
            jax.jit(LOSSES[name])(network(X), BAD_LABELS[kind])


@pytest.mark.parametrize(
    "call", [losses.kl_divergence, losses.distillation, losses.squared_probability_distance, losses.soft_cross_entropy]
)
def test_losses_of_two_predictions_refuse_other_shapes(call):
    for other in (network(X)[:, :1], network(X)[:1], network(X)[:, 0]):
        with pytest.raises(ValueError, match=r"must both be \[batch, classes\]"):
            call(network(X), other)


OUTPUTS = {
    "tuple": lambda x: (network(x), network(x)),
    "dict": lambda x: {"logits": network(x)},
    "vector": lambda x: network(x)[:, 0],
    "features": lambda x: network(x)[:, None],
    "one example": lambda x: network(x)[:1],
    "none": lambda x: None,
    "integers": lambda x: network(x).astype(int),
}


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("name", [*ATTACKS, "autoattack"])
def test_attacks_refuse_invalid_logits(name, output):
    attack = ATTACKS.get(name, partial(attacks.autoattack, version=("square",)))
    words = "must return floating logits" if output == "integers" else r"must return one array \[batch, classes\]"
    with pytest.raises(ValueError, match=words):
        attack(KEY, OUTPUTS[output], X, Y, eps=0.1)


@pytest.mark.parametrize("name", [*ATTACKS, "autoattack"])
def test_images_and_bounds_are_checked(name):
    attack = ATTACKS.get(name, partial(attacks.autoattack, version=("square",), num_queries=5))
    with pytest.raises(ValueError, match=r"inside bounds \(0.0, 1.0\), got values from 0. to 2[45]\d.*: scale or clip"):
        attack(KEY, network, 255 * X, Y, eps=8.0)
    with pytest.raises(ValueError, match=r"got values from 0. to 1.0000001:"):
        attack(KEY, network, X.at[0, 1, 1].set(1 + 1.2e-7), Y, eps=0.1)
    with pytest.raises(ValueError, match="x must be finite"):
        attack(KEY, network, X.at[0, 1, 1].set(jnp.nan), Y, eps=0.1)
    if name in ("pgd", "autoattack"):
        x_adv = attack(KEY, network, 255 * X, Y, eps=8.0, bounds=(0, 255))
        x_adv = x_adv.x_adv if name == "autoattack" else x_adv
        assert np.abs(x_adv - 255 * X).max() <= 8.001 and (np.abs(x_adv - 255 * X) > 0.1).any()
        attack(KEY, network, X, Y, eps=0.1, bounds=(X.min(), X.max()))
    for bounds in ((0, 0), (1, 0), (0, np.nan), 1.0, (0, 1, 2), (np.zeros(3), np.ones(3)), "01", ("a", "b")):
        with pytest.raises(ValueError, match="bounds"):
            attack(KEY, network, X, Y, eps=0.1, bounds=bounds)


@pytest.mark.parametrize("bounds", [(np.float64(0), np.float32(1)), [0, 1], jnp.array([0.0, 1.0]), (False, True)])
def test_bounds_may_have_any_number_type(bounds):
    assert checks.check_bounds(bounds) == (0.0, 1.0)


NUMBERS = {
    "pgd": {"step_size": 0.01, "num_steps": 2},
    "mim": {"step_size": 0.01, "num_steps": 2, "decay": 1.0},
    "cw": {"step_size": 0.01, "num_steps": 2, "confidence": 50.0},
    "apgd": {"num_steps": 3, "num_restarts": 1, "rho": 0.75},
    "apgd_targeted": {"num_steps": 3, "num_targets": 2, "rho": 0.75},
    "fab": {"num_steps": 2, "num_restarts": 2, "alpha_max": 0.1, "eta": 1.05, "beta": 0.9},
    "fab_targeted": {"num_steps": 2, "num_targets": 2, "alpha_max": 0.1, "eta": 1.05, "beta": 0.9},
    "square": {"num_queries": 5, "p_init": 0.8},
    "autoattack": {"num_queries": 5, "batch_size": 16, "version": ("square",)},
}


@pytest.mark.parametrize("name", NUMBERS)
def test_numeric_options_may_be_arrays(name):
    attack, plain = getattr(attacks, name), NUMBERS[name]
    expected = attack(KEY, network, X, Y, eps=0.1, **plain)
    kinds = itertools.cycle([np.asarray, jnp.asarray])
    options = {k: v if isinstance(v, tuple) else next(kinds)(v) for k, v in plain.items()}
    result = attack(KEY, network, X, Y, eps=next(kinds)(0.1), **options)
    np.testing.assert_allclose(*(getattr(x, "x_adv", x) for x in (result, expected)), atol=1e-6)
    for option, value in plain.items():
        if option == "version":
            continue
        signed = option in ("decay", "confidence")
        for bad in (*([] if signed else [-1]), np.nan, np.inf, "1", None, [1, 2]):  # refused before anything is traced
            with pytest.raises(ValueError, match=option):
                attack(KEY, network, X, Y, eps=0.1, **{**plain, option: bad})
        if isinstance(value, int):
            with pytest.raises(ValueError, match=option):
                attack(KEY, network, X, Y, eps=0.1, **{**plain, option: 2.5})
    for y in (None, ["a"] * 32, np.full(32, object()), [[1, 2]]):
        with pytest.raises(ValueError, match="labels"):
            attack(KEY, network, X, y, eps=0.1, **plain)
    for eps in (-0.1, np.nan, np.ones(3), "0.1"):
        with pytest.raises(ValueError, match="eps"):
            attack(KEY, network, X, Y, eps=eps, **plain)
    if not name.startswith("fab"):
        with pytest.raises(ValueError, match="eps must be finite"):
            attack(KEY, network, X, Y, eps=np.inf, **plain)


# Shapes of examples


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(64,), (4, 4, 4), (64, 1, 1)])
def test_square_attacks_vectors_and_images(shape):
    x = X.reshape(-1, *shape)
    x_adv = attacks.square(KEY, network, x, Y, eps=0.1, num_queries=60)
    assert x_adv.shape == x.shape and np.abs(x_adv - x).max() <= 0.1 + 1e-6
    assert wrong(x_adv).sum() > 10
    with pytest.raises(ValueError, match="square needs images of at least 5 x 5 pixels for L2"):
        attacks.square(KEY, network, x, Y, eps=0.8, norm="l2", num_queries=60)


def test_square_needs_no_channel_axis():
    plain, with_channel = (
        attacks.square(KEY, network, x, Y, eps=0.05, num_queries=30).reshape(X.shape) for x in (X[..., 0], X)
    )
    np.testing.assert_array_equal(plain, with_channel)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "norm", "attacked"),
    [((64,), "linf", True), ((64,), "l2", False), ((2, 2, 4, 4), "linf", False)],
)
def test_autoattack_notes_an_unsupported_attack(shape, norm, attacked):
    x, lines = np.asarray(X).reshape(-1, *shape), []
    run = partial(attacks.autoattack, KEY, network, x, Y, eps=0.01, norm=norm, num_queries=10)
    result = run(version=("apgd-ce", "square"), progress=lines.append)
    assert ("square" in result.accuracy) == attacked and result.accuracy["apgd-ce"] < 1
    if attacked:
        assert not result.notes
    else:
        assert len(result.notes) == 1 and result.notes[0].startswith("square is left out: it needs images")
        with pytest.raises(ValueError, match="square needs images"):
            run(version=("square",))


def test_jitted_attack_checks_every_call():
    options = {"eps": 0.1, "step_size": 0.05, "num_steps": 2}
    attack = attacks.jit(attacks.pgd, lambda _, x: network(x), **options)
    jax.eval_shape(lambda x: attack(KEY, None, x, Y), X)
    for _ in range(2):
        with pytest.raises(ValueError, match="x must lie inside bounds"):
            attack(KEY, None, 255 * X, Y)
        with pytest.raises(ValueError, match="labels of 4 classes, got 5 to 8"):
            attack(KEY, None, X, Y + 5)
        attack(KEY, None, X, Y)
    kl = attacks.jit(attacks.pgd, lambda _, x: network(x), objective=attacks.kl_divergence, **options)
    assert np.isfinite(kl(KEY, None, X, jax.nn.softmax(network(X)))).all()
    with pytest.raises(ValueError, match="autoattack drives compiled attacks from the host"):
        attacks.jit(attacks.autoattack, lambda _, x: network(x), eps=0.1)


@pytest.mark.parametrize("name", ["pgd", "apgd", "square"])
def test_objectives_must_return_one_value_per_example(name):
    for objective in (
        lambda z, y: z.sum(),
        lambda z, y: z,
        lambda z, y: attacks.logit_margin(z, y)[:, None],
        lambda *_: 0.0,
    ):
        with pytest.raises(ValueError, match=r"objective must return \[batch\] = \(32,\)"):
            ATTACKS[name](KEY, network, X, Y, eps=0.1, objective=objective)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dtypes"),
    [("pgd", ("uint8", "int64")), ("apgd", ("int8",)), ("fab", ("uint32", "int64")), ("square", ("uint8",))],
)
def test_labels_of_any_integer_type_under_strict_promotion(name, dtypes):
    for dtype in dtypes:
        with jax.numpy_dtype_promotion("strict"), jax.enable_x64(dtype == "int64"), jax.transfer_guard("disallow"):
            attacked = ATTACKS[name](KEY, network, np.asarray(X), np.asarray(Y).astype(dtype), eps=0.1)
        assert np.isfinite(attacked).all()


COUNTS = {"class_counts": [4, 3, 2, 1]}
TAIL = np.arange(4) > 1
OPTIONS = {
    "epsilon": lambda z, v: losses.kl_divergence(z, z, epsilon=v),
    "temperature": lambda z, v: losses.distillation(z, z, temperature=v),
    "gamma": lambda z, v: losses.focal(z, Y, gamma=v),
    "tau": lambda z, v: losses.logit_adjustment(z, Y, tau=v, **COUNTS),
    "max_margin": lambda z, v: losses.ldam(z, Y, max_margin=v, **COUNTS),
    "tau_m": lambda z, v: losses.robal_margin(z, Y, tau_m=v, **COUNTS),
    "margin": lambda z, v: losses.tail_alignment(z, Y, margin=v, tail=TAIL, **COUNTS),
    "beta": lambda z, v: losses.class_balanced_weights([4, 3, 2, 1], beta=v),
    "predicted_counts": lambda z, v: losses.rebalanced_weights([4, 3, 2, 1], np.array([v, 1, 1, 1], float)),
    "logit_scale": lambda z, v: attacks.cross_entropy(z, Y, logit_scale=v),
    "confidence": lambda z, v: attacks.cw(KEY, network, X, Y, eps=0.1, step_size=0.1, num_steps=1, confidence=v),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_options_of_losses_are_finite_numbers(option):
    for value in (np.nan, np.inf):
        with pytest.raises(ValueError, match=option):
            OPTIONS[option](network(X), value)
    if option != "predicted_counts":
        with pytest.raises(ValueError, match=option):
            OPTIONS[option](network(X), "1")


@pytest.mark.parametrize("tail", [np.arange(3) > 1, [2, 3], [[False, False, True, True]], np.array([0, 0, 1, 1])])
@pytest.mark.parametrize("loss", [losses.tail_alignment, losses.tail_alignment_released])
def test_tail_must_be_a_mask_of_classes(loss, tail):
    with pytest.raises(ValueError, match=r"tail must be a mask of the tail classes, bool \(4,\)"):
        loss(network(X), Y, tail=tail, **COUNTS)
    loss(network(X), np.asarray(Y).tolist(), tail=TAIL.tolist(), **COUNTS)  # lists will do


@pytest.mark.parametrize("logits", [None, {"logits": network(X)}, "logits", network(X) + 0j])
def test_losses_refuse_invalid_logits(logits):
    with pytest.raises(ValueError, match="arrays of real numbers"):
        losses.cross_entropy(logits, Y)
    with pytest.raises(ValueError, match="array of numbers"):
        attacks.cross_entropy(logits, Y)


@pytest.mark.parametrize("objective", [None, "cross_entropy", 1.0])
@pytest.mark.parametrize("name", ["fgsm", "pgd", "mim", "apgd", "apgd_targeted", "square"])
def test_objective_must_be_a_function(name, objective):
    with pytest.raises(ValueError, match=r"objective must be a function \(logits, y\) -> \[batch\]") as caught:
        ATTACKS[name](KEY, network, X, Y, eps=0.1, objective=objective)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("num_classes", ["4", None, 0, -1, 2.5, True])
def test_number_of_classes_must_be_a_positive_int(num_classes):
    with pytest.raises(ValueError, match="num_classes must be a Python int, 1 or more"):
        losses.hierarchical_equalisation(jnp.ones(32), Y, num_classes=num_classes)


@pytest.mark.parametrize("option", ["epsilon", "temperature", "beta"])
def test_constant_options_of_losses_cannot_be_traced(option):
    with pytest.raises(ValueError, match=f"{option} must be a constant when the loss is traced"):
        jax.jit(lambda value: OPTIONS[option](network(X), value))(0.5)
