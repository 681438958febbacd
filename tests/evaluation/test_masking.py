"""Diagnostics and verdicts on gradient masking: two digit networks, without and with masked gradients.

A mask is a set of variables of one function, so that all masks share their compiled programs.
"""

import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from lt_adv.evaluation import masking
from lt_adv.evaluation.masking import diagnose
from tests.attacks.conftest import digits  # noqa: F401 (a fixture)

pytestmark = pytest.mark.slow

IMAGES, EPS = 150, 0.15
PROTOCOL = {"eps": EPS, "step_size": EPS / 4, "queries": 200}
GROUPS = {"head": range(3), "body": range(3, 7), "tail": range(7, 10)}


@pytest.fixture(scope="module", autouse=True)
def optimised():
    """Compiles with optimisation: these programs run for longer than they compile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "jit", functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 3}))
        yield


@pytest.fixture(scope="module")
def heads(digits):  # noqa: F811
    """Returns (rows of the sample, networks by head, functions (variables, x) -> logits by head)."""
    loaded = {head: digits(head) for head in ("linear", "cosine")}
    rows = masking.balanced_sample(loaded["linear"].y, IMAGES)

    def masked(apply, variables, x):
        quantised = jax.lax.stop_gradient(jnp.round(x * 15) / 15)
        logits = apply(variables["weights"], jnp.where(variables["quantised"], quantised, x))
        logits = logits * variables["temperature"]
        return jnp.where(variables["softmax"], jax.nn.softmax(logits), logits)

    functions = {head: functools.partial(masked, network.apply) for head, network in loaded.items()}
    return rows, loaded, functions


@pytest.fixture(scope="module")
def diagnostics(heads):
    """`diagnostics("cosine", temperature=1e4)`: of a head with a mask; the baseline is "linear" without one."""
    rows, loaded, functions = heads

    def variables(head, temperature=1.0, quantised=False, softmax=False):
        temperature = np.broadcast_to(np.float32(temperature), 10)
        return {
            "weights": loaded[head].weights,
            "temperature": temperature,
            "quantised": np.array(quantised),
            "softmax": np.array(softmax),
        }

    @functools.lru_cache
    def run(head, **mask):
        images, labels = loaded["linear"].x[rows], loaded["linear"].y[rows]
        return masking.run_diagnostics(
            jax.random.key(0),
            functions[head],
            variables(head, **mask),
            images,
            labels,
            transfer=(functions["linear"], variables("linear")),
            **PROTOCOL,
        )

    return run


@pytest.fixture(scope="module")
def verdict(diagnostics):
    """`verdict("cosine", temperature=1e4)`: on a head with a mask."""
    return lambda head, **mask: masking.masking_verdict(diagnostics(head, **mask), diagnostics("linear"), GROUPS)


@pytest.mark.parametrize("head", ["linear", "cosine"])
def test_networks_without_masking_are_trustworthy(diagnostics, verdict, head):
    result = verdict(head)
    assert result["trustworthy"], result["reasons"]
    assert result["words"].startswith("No sign of gradient masking (PGD-20 ")
    assert masking.masking_verdict(diagnostics("linear"), diagnostics(head), GROUPS)["trustworthy"]


def test_diagnostics_of_a_network_without_masking(diagnostics, heads):
    rows, loaded, _ = heads
    result = diagnostics("linear")
    assert json.loads(json.dumps(result)) == result
    logits = loaded["linear"].arrays["logits"][rows]
    top = np.sort(logits, -1)
    assert result["logit_lead"] == pytest.approx(np.median(top[:, -1] - top[:, -2]), rel=1e-4)
    correct = masking.correct_by_attack(result)
    assert (correct["clean"] == (logits.argmax(-1) == loaded["linear"].y[rows])).all()
    assert result["logits_change"] == 0 and not result["probabilities"] and result["classes"] == 10
    assert "1" not in result["zero_gradient"]
    summary = masking.summarise_diagnostics(result)
    radii, robust = zip(*summary["by_radius"], strict=True)
    assert radii == pytest.approx([EPS, 2 * EPS, 4 * EPS, 1]) and robust[-1] == 0
    assert list(robust) == sorted(robust, reverse=True) and robust[0] == summary["accuracy"]["pgd20"]
    assert summary["worst"] <= min(summary["accuracy"].values())


@pytest.mark.parametrize(
    ("head", "mask"),
    [
        ("linear", {"temperature": 1e4}),  # saturated softmax: vanishing gradients
        ("cosine", {"temperature": 1e4}),  # a cosine head with a huge temperature
        ("linear", {"temperature": 1e-4}),  # PGD follows the sum of all other logits
        ("linear", {"quantised": True}),  # shattered gradients
        ("cosine", {"quantised": True}),
    ],
)
def test_masked_gradients_are_detected(verdict, head, mask):
    result = verdict(head, **mask)
    assert result["trustworthy"] is False
    assert result["reasons"][0].startswith("Most of the gain over the baseline vanishes in the worst case: PGD-20 ")
    assert result["words"].startswith("Signs of gradient masking: robustness is overestimated (PGD-20 ")


@pytest.mark.parametrize(
    ("head", "mask", "signs"),
    [
        ("linear", {}, []),
        ("cosine", {}, []),
        ("linear", {"temperature": 1e4}, ["exactly zero", "radius of 1"]),
        ("cosine", {"temperature": 1e4}, ["exactly zero", "radius of 1"]),
        ("linear", {"quantised": True}, ["exactly zero", "Square breaks", "radius of 1"]),
        ("cosine", {"quantised": True}, ["exactly zero", "Square breaks", "radius of 1"]),
        ("linear", {"softmax": True}, ["probabilities"]),
    ],
)
def test_signs_of_masking_without_a_baseline(diagnostics, head, mask, signs):
    result = diagnostics(head, **mask)
    alone = {**result, "correct": {name: text for name, text in result["correct"].items() if name != "transfer"}}
    verdict = masking.masking_verdict(alone, None)
    assert len(verdict["reasons"]) == len(signs)
    assert all(sign in reason for sign, reason in zip(signs, verdict["reasons"], strict=True)), verdict["reasons"]
    assert verdict["trustworthy"] is (False if signs else None) and not verdict["gains"]
    assert "baseline" not in " ".join([*verdict["reasons"], *verdict["notes"]])


def test_a_sign_on_a_few_images_is_noise(diagnostics):
    """Square breaks eight of 150 images that withstand the gradient attacks, which is below three standard errors."""
    result = diagnostics("linear")
    robust = np.logical_and.reduce(
        [column for name, column in masking.correct_by_attack(result).items() if not name.startswith("radius_")]
    )
    for broken, found in ((8, False), (20, True)):
        square = robust.copy()
        square[np.flatnonzero(robust)[:broken]] = False
        changed = {**result["correct"], "square": diagnose.bits_to_text(square)}
        reasons = masking.masking_verdict({**result, "correct": changed}, None)["reasons"]
        assert any("Square breaks" in reason for reason in reasons) == found


def test_a_rescaling_by_class_gains_under_pgd_alone(verdict, heads):
    """As CDT after training, z_c / n_c^tau, on large logits: it favours the tail, and loses in the worst case."""
    counts = heads[1]["linear"].arrays["class_counts"]
    result = verdict("linear", temperature=tuple(1e3 * counts**-0.1))
    gain = result["gains"][0]
    assert gain["attack"] == "pgd20" and gain["gain"] > gain["noise"]
    assert not result["trustworthy"] and not gain["real"]


def test_zero_gradients_are_counted_and_reported(diagnostics, verdict):
    assert set(diagnostics("linear", quantised=True)["zero_gradient"]) == {"1"}
    assert diagnostics("linear", temperature=1e4)["zero_gradient"].count("1") > IMAGES / 2
    reasons = " ".join(verdict("linear", quantised=True)["reasons"])
    for words in (
        "zero on 100.0 % of",
        "Square breaks",
        "The transfer attack from the baseline breaks",
        "radius of 1,",
    ):
        assert words in reasons


def test_probabilities_are_reported(verdict):
    result = verdict("linear", softmax=True)
    assert not result["trustworthy"] and "The logits are probabilities" in result["reasons"][0]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("head", ["linear", "cosine"])
def test_a_network_against_itself_is_trustworthy(diagnostics, head, seed):
    """On any choice of images, also where the two sides hold different images of the same classes."""
    result = diagnostics(head)
    rows = np.random.default_rng(seed).permutation(IMAGES)[: 20 + 8 * seed]
    subset = take(result, rows)
    assert masking.masking_verdict(subset, subset, GROUPS)["trustworthy"]
    even = np.arange(0, IMAGES - 1, 2)  # labels are sorted: neighbours are of one class
    first, second = take(result, even), take(result, even + 1)
    assert masking.masking_verdict(first, {**second, "label": first["label"]}, None)["trustworthy"]


def take(diagnostics, rows):
    """Returns the diagnostics on some of the images."""

    def select(text):
        return "".join(text[i] for i in rows)

    return {
        **diagnostics,
        "label": [diagnostics["label"][i] for i in rows],
        "zero_gradient": select(diagnostics["zero_gradient"]),
        "correct": {name: select(text) for name, text in diagnostics["correct"].items()},
    }


def test_a_gain_in_the_tail_alone_is_rejected_there(diagnostics):
    """PGD breaks no tail image of this network, the worst case as many as on the baseline."""
    baseline = diagnostics("linear")
    label = np.array(baseline["label"])
    pgd = "".join(np.where(label >= 7, "1", list(baseline["correct"]["pgd20"])))
    network = {**baseline, "correct": {**baseline["correct"], "pgd20": pgd}}
    reasons = masking.masking_verdict(network, baseline, GROUPS)["reasons"]
    (reason,) = (line for line in reasons if "in the tail" in line)
    assert "PGD-20 100.0 % against" in reason and "(+0.0 points, noise 0.0)" in reason
    assert not any("in the head" in line or "in the body" in line for line in reasons)


@pytest.mark.parametrize(("left", "real"), [(0.0, False), (0.1, False), (0.3, True), (0.4, True)])
def test_a_gain_is_real_where_most_of_it_is_left(left, real):
    """500 images, 40 points gained under PGD, a share `left` of the images gained in the worst case."""
    gained, gained_under_square = np.arange(500) < 200, np.arange(500) < 500 * left
    correct = {"clean": gained, "pgd20": gained, "square": gained_under_square}
    baseline_correct = dict.fromkeys(correct, np.zeros(500, bool))
    assert masking.gain_over_baseline("", "pgd20", correct, baseline_correct)["real"] == real


def test_a_gap_wider_than_that_of_the_baseline_is_no_masking():
    """PGD gains 30 points, of which 25 are left."""
    images = np.arange(500)
    correct = {"clean": images < 400, "pgd20": images < 350, "cw20": images < 325, "square": images < 325}
    baseline_correct = {"clean": images < 400, "pgd20": images < 200, "cw20": images < 200, "square": images < 200}
    gain = masking.gain_over_baseline("", "pgd20", correct, baseline_correct)
    assert gain["real"] and gain["lost"] > gain["lost_noise"]


@pytest.mark.parametrize(("images", "real"), [(1, True), (9, True), (10, False)])
def test_few_images_are_no_evidence(images, real):
    """All are gained under PGD and lost under Square."""
    gained, none = np.ones(images, bool), np.zeros(images, bool)
    correct = {"clean": gained, "pgd20": gained, "square": none}
    gain = masking.gain_over_baseline("", "pgd20", correct, dict.fromkeys(correct, none))
    assert gain["real"] == real and np.isfinite([gain["noise"], gain["lost_noise"]]).all()


@pytest.fixture
def small(heads):
    """Returns (network, images, labels, options) of cheap diagnostics on twenty images."""
    rows, loaded, _ = heads
    network = loaded["linear"]
    options = {"eps": EPS, "step_size": EPS / 4, "num_steps": 2, "queries": 5}
    return network, network.x[rows[::8]], network.y[rows[::8]], options


@pytest.mark.parametrize("jitted", [True, False])
def test_a_random_forward_pass_is_reported(small, jitted):
    """Noise drawn in each pass, or from a counter that a trace would freeze."""
    network, x, y, options = small
    rng, calls = np.random.default_rng(0), itertools.count()

    def noise():
        return np.float32(rng.normal())

    def apply(weights, x):
        if jitted:
            return network.apply(weights, x) + jax.pure_callback(noise, jax.ShapeDtypeStruct((), np.float32))
        return network.apply(weights, x) * (1.0 + next(calls))

    result = masking.run_diagnostics(jax.random.key(0), apply, network.weights, x, y, **options)
    assert result["logits_change"] > 0.01
    assert "The forward pass is random" in masking.masking_verdict(result, None)["reasons"][0]


def test_constant_logits_are_compared_with_a_baseline(small):
    """Logits without a lead have no scale; the protocol is that of any network."""
    network, x, y, options = small
    constant = lambda weights, x: network.apply(weights, x) * 0.0  # noqa: E731
    results = [
        masking.run_diagnostics(jax.random.key(0), apply, network.weights, x, y, **options)
        for apply in (constant, network.apply)
    ]
    assert not results[0]["scales"] and masking.summarise_diagnostics(results[0])["by_lead"] == []
    assert (
        masking.masking_verdict(*results)["gains"][0]["gain"]
        < 0
        < masking.masking_verdict(*results[::-1])["gains"][0]["gain"]
    )


def test_without_a_baseline_no_gain_is_tested(small):
    network, x, y, options = small
    result = masking.run_diagnostics(jax.random.key(0), network.apply, network.weights, x, y, **options)
    assert "transfer" not in result["correct"]
    verdict = masking.masking_verdict(result, None)
    assert verdict["trustworthy"] is None and "Without a baseline" in verdict["words"] and not verdict["reasons"]


def test_neither_batches_nor_devices_change_the_diagnostics(small):
    network, x, y, options = small
    run = functools.partial(
        masking.run_diagnostics, jax.random.key(3), network.apply, network.weights, labels=y, **options
    )
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    expected, result = run(images=x), run(images=np.round(x * 255).astype(np.uint8), batch_size=7, mesh=mesh)
    assert result["correct"].keys() == expected["correct"].keys()
    for name, text in expected["correct"].items():
        assert sum(a != b for a, b in zip(text, result["correct"][name], strict=True)) <= 1, name  # by rounding


def test_autoattack_replaces_square(small):
    network, x, y, options = small
    result = masking.run_diagnostics(
        jax.random.key(0), network.apply, network.weights, x[:8], y[:8], autoattack=("apgd-ce",), **options
    )
    assert "square" not in result["correct"] and len(result["correct"]["autoattack"]) == 8
    assert result["protocol"]["autoattack"] == ["apgd-ce"]


def test_few_classes_are_noted(diagnostics):
    baseline = {**diagnostics("linear"), "classes": 3}
    assert "There are 3 classes" in masking.masking_verdict(baseline, baseline)["notes"][0]


def test_diagnostics_of_different_protocols_are_refused(diagnostics):
    result = diagnostics("linear")
    other = {**result, "protocol": {**result["protocol"], "eps": 0.1}}
    with pytest.raises(ValueError, match="its baseline differ in 'protocol'"):
        masking.masking_verdict(result, other)


def test_the_sample_is_balanced():
    label = np.repeat([0, 1, 2, 3], [50, 40, 7, 3])
    rows = masking.balanced_sample(label, 40)
    assert (np.diff(rows) > 0).all() and np.bincount(label[rows]).tolist() == [15, 15, 7, 3]
    assert set(masking.balanced_sample(label, 20)) <= set(rows) and len(masking.balanced_sample(label)) == 100


def test_bad_images_and_logits_are_refused(small):
    network, x, y, options = small
    with pytest.raises(ValueError, match="are needed"):
        masking.run_diagnostics(jax.random.key(0), network.apply, network.weights, x, y[:-1], **options)
    for eps in (0.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match="must be above 0"):
            masking.run_diagnostics(jax.random.key(0), network.apply, network.weights, x, y, **options | {"eps": eps})
    with pytest.raises(ValueError, match="finite"):
        not_finite = lambda weights, x: network.apply(weights, x) * jnp.nan  # noqa: E731
        masking.run_diagnostics(jax.random.key(0), not_finite, network.weights, x, y, **options)
