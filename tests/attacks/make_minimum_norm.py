"""Writes tests/golden/minimum_norm.json: distances that foolbox's attacks find on the two digit networks.

    pip install foolbox==3.3.4
    python -m tests.attacks.make_minimum_norm

foolbox executes operation by operation, which takes minutes where the optimisation of the compiler is off, as in tests.
"""

import json
import os

import foolbox
import jax
import jax.numpy as jnp
import numpy as np

from tests.attacks.conftest import GOLDEN, load

IMAGES = 200
ATTACKS = {  # ours -> foolbox's, with the default number of steps of both
    "ddn l2": foolbox.attacks.DDNAttack(steps=100),
    "fmn linf": foolbox.attacks.LInfFMNAttack(steps=100),
    "fmn l2": foolbox.attacks.L2FMNAttack(steps=100),
    "fmn l1": foolbox.attacks.L1FMNAttack(steps=100),
    "deepfool linf": foolbox.attacks.LinfDeepFoolAttack(steps=50),
    "deepfool l2": foolbox.attacks.L2DeepFoolAttack(steps=50),
}


def main() -> None:
    distances: dict[str, dict[str, list[float | None]]] = {}
    for head in ("linear", "cosine"):
        network = load(head)
        x, y = jnp.asarray(network.x[:IMAGES]), jnp.asarray(network.y[:IMAGES])
        model = foolbox.models.JAXModel(jax.jit(network.logits_fn), bounds=(0, 1))
        distances[head] = {}
        for name, attack in ATTACKS.items():
            x_adv, _, found = attack(model, x, y, epsilons=None)
            values = np.asarray(attack.distance(x, x_adv), np.float64)
            distances[head][name] = [
                float(f"{d:.6g}") if ok else None for d, ok in zip(values, np.asarray(found), strict=True)
            ]
    with open(os.path.join(GOLDEN, "minimum_norm.json"), "w") as file:
        json.dump({"foolbox": foolbox.__version__, "images": IMAGES, "distances": distances}, file)
        file.write("\n")


if __name__ == "__main__":
    main()
