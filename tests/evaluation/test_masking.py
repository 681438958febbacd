"""What `probe` finds and `verdict` says: two honest digit networks, and the same ones behind masks.

A mask is a set of variables of one function, so that all of them share their compiled programs.
"""

import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from lt_adv.evaluation.masking import diagnose, verdict
from tests.attacks.conftest import digits  # noqa: F401 (a fixture)

IMAGES, EPS = 150, 0.15
PROTOCOL = {"eps": EPS, "step_size": EPS / 4, "queries": 200}
GROUPS = {"head": range(3), "body": range(3, 7), "tail": range(7, 10)}


@pytest.fixture(scope="module", autouse=True)
def optimised():
    """Programs that run for longer than they compile: without optimisation these take ten times as long."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "jit", functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 3}))
        yield


@pytest.fixture(scope="module")
def heads(digits):  # noqa: F811
    """Of both heads: the images probed, the weights, and the function of (variables, x) that all masks share."""
    loaded = {head: digits(head) for head in ("linear", "cosine")}
    rows = diagnose.probed(loaded["linear"].y, IMAGES)

    def masked(plain, variables, x):
        steps = jax.lax.stop_gradient(jnp.round(x * 15) / 15)
        logits = plain(variables["weights"], jnp.where(variables["quantised"], steps, x)) * variables["temperature"]
        return jnp.where(variables["softmax"], jax.nn.softmax(logits), logits)

    functions = {head: functools.partial(masked, network.apply) for head, network in loaded.items()}
    return rows, loaded, functions


@pytest.fixture(scope="module")
def facts(heads):
    """`facts("cosine", temperature=1e4)`: of a head behind a mask; the baseline is "linear", without one."""
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
    def find(head, **mask):
        images, labels = loaded["linear"].x[rows], loaded["linear"].y[rows]
        return diagnose.probe(
            jax.random.key(0),
            functions[head],
            variables(head, **mask),
            images,
            labels,
            transfer=(functions["linear"], variables("linear")),
            **PROTOCOL,
        )

    return find


@pytest.fixture(scope="module")
def judged(facts):
    return lambda head, **mask: verdict.decide(facts(head, **mask), facts("linear"), GROUPS)


@pytest.mark.parametrize("head", ["linear", "cosine"])
def test_honest_networks_are_trustworthy(facts, judged, head):
    found = judged(head)
    assert found["trustworthy"], found["reasons"]
    assert found["words"].startswith("Trustworthy (PGD-20 ")
    assert verdict.decide(facts("linear"), facts(head), GROUPS)["trustworthy"]


def test_facts_of_an_honest_network(facts, heads):
    rows, loaded, _ = heads
    found = facts("linear")
    assert json.loads(json.dumps(found)) == found
    logits = loaded["linear"].arrays["logits"][rows]
    top = np.sort(logits, -1)
    assert found["logit_lead"] == pytest.approx(np.median(top[:, -1] - top[:, -2]), rel=1e-4)
    right = diagnose.rows(found)
    assert (right["clean"] == (logits.argmax(-1) == loaded["linear"].y[rows])).all()
    assert found["logits_change"] == 0 and not found["probabilities"] and found["classes"] == 10
    assert "1" not in found["zero_gradient"]
    figures = verdict.figures(found)
    radii, robust = zip(*figures["by_radius"], strict=True)
    assert radii == pytest.approx([EPS, 2 * EPS, 4 * EPS, 1]) and robust[-1] == 0
    assert list(robust) == sorted(robust, reverse=True) and robust[0] == figures["accuracy"]["pgd20"]
    assert figures["worst"] <= min(figures["accuracy"].values())


@pytest.mark.parametrize(
    ("head", "mask"),
    [
        ("linear", {"temperature": 1e4}),  # logits saturate the softmax
        ("cosine", {"temperature": 1e4}),  # a cosine head with a huge temperature
        ("linear", {"temperature": 1e-4}),  # PGD follows the sum of all other logits
        ("linear", {"quantised": True}),  # which no threshold was chosen by
        ("cosine", {"quantised": True}),
    ],
)
def test_masks_are_not_real(judged, head, mask):
    found = judged(head, **mask)
    assert found["trustworthy"] is False
    assert found["reasons"][0].startswith("The gain over the baseline is not real: PGD-20 ")
    assert found["words"].startswith("Not trustworthy (PGD-20 ")


def test_a_rescaling_by_class_gains_under_pgd_alone(judged, heads):
    """As CDT after training, z_c / n_c^tau, on large logits; it favours the tail, and loses in the worst case."""
    counts = heads[1]["linear"].arrays["class_counts"]
    found = judged("linear", temperature=tuple(1e3 * counts**-0.1))
    gain = found["gains"][0]
    assert gain["attack"] == "pgd20" and gain["gain"] > gain["noise"]
    assert not found["trustworthy"] and not gain["real"]


def test_zero_gradients_are_counted_and_unmasked(facts, judged):
    assert set(facts("linear", quantised=True)["zero_gradient"]) == {"1"}
    assert facts("linear", temperature=1e4)["zero_gradient"].count("1") > IMAGES / 2
    reasons = " ".join(judged("linear", quantised=True)["reasons"])
    for words in ("zero on 100.0 % of", "Square breaks", "Examples made on the baseline break", "at a radius of 1,"):
        assert words in reasons


def test_probabilities_are_flagged(judged):
    found = judged("linear", softmax=True)
    assert not found["trustworthy"] and "The logits are probabilities" in found["reasons"][0]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("head", ["linear", "cosine"])
def test_a_network_against_itself_is_trustworthy(facts, head, seed):
    """Whatever the images; so is one whose every column differs by chance alone, another half of the images."""
    found = facts(head)
    chosen = np.random.default_rng(seed).permutation(IMAGES)[: 20 + 8 * seed]
    some = cut(found, chosen)
    assert verdict.decide(some, some, GROUPS)["trustworthy"]
    same = np.arange(0, IMAGES - 1, 2)  # labels are sorted: neighbours are of one class
    first, second = cut(found, same), cut(found, same + 1)
    assert verdict.decide(first, {**second, "label": first["label"]}, None)["trustworthy"]


def cut(facts, rows):
    """The facts on some of the images."""

    def pick(text):
        return "".join(text[i] for i in rows)

    return {
        **facts,
        "label": [facts["label"][i] for i in rows],
        "zero_gradient": pick(facts["zero_gradient"]),
        "right": {name: pick(text) for name, text in facts["right"].items()},
    }


def test_a_gain_in_the_tail_alone_is_judged_there(facts):
    """Ninety images, nine points each: PGD sees a tail that the worst case does not."""
    baseline = facts("linear")
    label = np.array(baseline["label"])
    pgd = np.where(label >= 7, "1", list(baseline["right"]["pgd20"]))
    found = verdict.decide({**baseline, "right": {**baseline["right"], "pgd20": "".join(pgd)}}, baseline, GROUPS)
    (reason,) = (line for line in found["reasons"] if "in the tail" in line)
    assert "PGD-20 100.0 % against" in reason and "(+0.0 points, noise 0.0)" in reason
    assert not any("in the head" in line or "in the body" in line for line in found["reasons"])


@pytest.mark.parametrize(("left", "real"), [(0.0, False), (0.1, False), (0.3, True), (0.4, True)])
def test_most_of_a_gain_must_be_left(left, real):
    """500 images, 40 points gained under PGD, of which so many are left in the worst case."""
    gained = np.arange(500) < 200
    kept = np.arange(500) < 500 * left
    mine = {"clean": gained, "pgd20": gained, "square": kept}
    theirs = dict.fromkeys(mine, np.zeros(500, bool))
    assert verdict.gain("", "pgd20", mine, theirs)["real"] == real


def test_a_gap_that_is_wider_than_the_baselines_is_no_reason():
    """Honest heads differ in it: PGD gains 30 points and 25 are left; the note says what to quote."""
    images = np.arange(500)
    mine = {"clean": images < 400, "pgd20": images < 350, "cw20": images < 325, "square": images < 325}
    theirs = {"clean": images < 400, "pgd20": images < 200, "cw20": images < 200, "square": images < 200}
    found = verdict.gain("", "pgd20", mine, theirs)
    assert found["real"] and found["lost"] > found["lost_noise"]


@pytest.fixture
def small(heads):
    """Twenty images, and the arguments of a probe that takes as little time as can be."""
    rows, loaded, _ = heads
    network = loaded["linear"]
    options = {"eps": EPS, "step_size": EPS / 4, "num_steps": 2, "queries": 5}
    return network, network.x[rows[::8]], network.y[rows[::8]], options


@pytest.mark.parametrize("jitted", [True, False])
def test_a_random_forward_pass_is_flagged(small, jitted):
    """Noise that each pass draws, or that a trace would freeze."""
    network, x, y, options = small
    rng, calls = np.random.default_rng(0), itertools.count()

    def noise():
        return np.float32(rng.normal())

    def apply(weights, x):
        if jitted:
            return network.apply(weights, x) + jax.pure_callback(noise, jax.ShapeDtypeStruct((), np.float32))
        return network.apply(weights, x) * (1.0 + next(calls))

    found = diagnose.probe(jax.random.key(0), apply, network.weights, x, y, **options)
    assert found["logits_change"] > 0.01
    assert "The forward pass is random" in verdict.decide(found, None)["reasons"][0]


def test_without_a_baseline_there_is_no_verdict(small):
    network, x, y, options = small
    found = diagnose.probe(jax.random.key(0), network.apply, network.weights, x, y, **options)
    assert "transfer" not in found["right"]
    said = verdict.decide(found, None)
    assert said["trustworthy"] is None and "needs a baseline" in said["words"] and not said["reasons"]


def test_neither_batches_nor_devices_change_the_facts(small):
    network, x, y, options = small
    probe = functools.partial(diagnose.probe, jax.random.key(3), network.apply, network.weights, labels=y, **options)
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    one, other = probe(images=x), probe(images=np.round(x * 255).astype(np.uint8), batch_size=7, mesh=mesh)
    assert other["right"].keys() == one["right"].keys()
    for name, text in one["right"].items():
        assert sum(a != b for a, b in zip(text, other["right"][name], strict=True)) <= 1, name  # by rounding


def test_autoattack_takes_the_place_of_square(small):
    network, x, y, options = small
    found = diagnose.probe(
        jax.random.key(0), network.apply, network.weights, x[:8], y[:8], autoattack=("apgd-ce",), **options
    )
    assert "square" not in found["right"] and len(found["right"]["autoattack"]) == 8
    assert found["protocol"]["autoattack"] == ["apgd-ce"]


def test_few_classes_are_noted(facts):
    baseline = {**facts("linear"), "classes": 3}
    assert "There are 3 classes" in verdict.decide(baseline, baseline)["notes"][0]


def test_facts_of_different_protocols_do_not_meet(facts):
    found = facts("linear")
    other = {**found, "protocol": {**found["protocol"], "eps": 0.1}}
    with pytest.raises(ValueError, match="different ways: see 'protocol'"):
        verdict.decide(found, other)


def test_probed_images_are_balanced():
    label = np.repeat([0, 1, 2, 3], [50, 40, 7, 0 + 3])
    rows = diagnose.probed(label, 40)
    assert (np.diff(rows) > 0).all() and np.bincount(label[rows]).tolist() == [15, 15, 7, 3]
    assert set(diagnose.probed(label, 20)) <= set(rows) and len(diagnose.probed(label)) == 100


def test_bad_input(small):
    network, x, y, options = small
    with pytest.raises(ValueError, match="are needed"):
        diagnose.probe(jax.random.key(0), network.apply, network.weights, x, y[:-1], **options)
    with pytest.raises(ValueError, match="finite"):
        broken = lambda weights, x: network.apply(weights, x) * jnp.nan  # noqa: E731
        diagnose.probe(jax.random.key(0), broken, network.weights, x, y, **options)
