"""Distances of minimum-norm attacks on the digit networks, in a process of its own: compiled as users' programs are.

python -m tests.attacks.minimum_norm_distances results.json
"""

import json
import os
import sys

import jax
import numpy as np

from lt_adv import attacks
from tests.attacks.conftest import GOLDEN, load

IMAGES = 200  # all of those in the golden file, which has foolbox's distances

if __name__ == "__main__":
    with open(os.path.join(GOLDEN, "minimum_norm.json")) as file:
        golden = json.load(file)
    distances = {}
    for head, cases in golden["distances"].items():
        net = load(head)
        x, y = net.x[:IMAGES], net.y[:IMAGES]
        correct = np.asarray(net.logits_fn(x).argmax(-1) == y)
        for case, theirs in cases.items():
            name, norm = case.split()
            ours = getattr(attacks, name)(jax.random.key(0), net.logits_fn, x, y, norm=norm).distance
            pair = (np.asarray(ours, float)[correct], np.array(theirs[:IMAGES], float)[correct])  # None becomes NaN
            distances[f"{head} {case}"] = [np.nan_to_num(values, nan=np.inf).tolist() for values in pair]
    with open(sys.argv[1], "w") as file:
        json.dump(distances, file)  # of the images that are classified correctly
