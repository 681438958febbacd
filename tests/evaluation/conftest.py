"""Six records for results computed by hand, and a tiny network with images to attack."""

import io
import types

import jax
import numpy as np
import pytest
import rich.console
from jax.sharding import Mesh

from lt_adv.evaluation import Records, evaluate

PGD = {"attack": "pgd", "eps": 0.031, "step_size": 0.02, "num_steps": 3, "start": "uniform"}


@pytest.fixture
def hand_made():
    """Classes ant, bee, cat with 3, 2, 1 images. The third is wrong clean but correct under both attacks."""
    entry = {"attack": "pgd", "norm": "linf", "start": "uniform", "eps": 0.031, "step_size": 0.0078, "num_steps": 20}
    header = {
        "class_names": ["ant", "bee", "cat"],
        "attacks": {"fgsm": {"attack": "fgsm", "eps": 8 / 255, "start": "zero"}, "pgd20": entry},
        "images": 6,
        "images_per_class": [3, 2, 1],
        "batch_size": 4,
        "device": "8 x cpu",
        "jax_version": "0.10.2",
        "code_version": "1a2b3c",
        "seed": 3,
        "checkpoint_step": 1200,
        "subset": None,
    }
    label, index = np.array([0, 0, 0, 1, 1, 2], np.int32), np.array([9, 4, 5, 0, 1, 7])
    clean = np.array([0, 0, 1, 1, 1, 0], np.int32)
    fgsm = np.array([0, 1, 0, 1, 0, 2], np.int32)
    pgd20 = np.array([1, 1, 0, 1, 0, 0], np.int32)
    return Records(header, index, label, clean, {"fgsm": fgsm, "pgd20": pgd20})


def apply(variables, x):
    return (x.reshape(len(x), -1) - 0.5) @ variables["kernel"]


@pytest.fixture(scope="session")
def toy():
    """Returns twenty 4x4 images of three classes, a linear network, and further arguments of `evaluate`."""
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(16, 3)).astype(np.float32)
    image = rng.integers(64, 192, (20, 4, 4, 1), dtype=np.uint8)
    image[4, 0, :2, 0] = 0, 255  # the ends of the pixel range
    prediction = np.asarray(apply({"kernel": kernel}, image / 255)).argmax(-1)
    split = types.SimpleNamespace(
        image=image,
        label=np.where(np.arange(20) % 5, prediction, np.arange(20) % 3).astype(np.int32),
        index=np.arange(20)[::-1] + 100,
    )
    return types.SimpleNamespace(
        split=split,
        variables={"kernel": kernel},
        apply=apply,
        key=jax.random.key(7),
        attacks={"fgsm": {"attack": "fgsm", "eps": 8 / 255}, "pgd": PGD, "lsa": {**PGD, "logit_scale": 10.0}},
        pgd=PGD,
        names=("ant", "bee", "cat"),
        mesh=lambda devices: Mesh(np.array(jax.devices()[:devices]), ("data",)),
    )


@pytest.fixture
def run(toy, tmp_path):
    """`run(batch_size=7, devices=8, ...)`: evaluates the toy network; returns (records, printed text)."""

    def call(batch_size=7, devices=8, directory=tmp_path, header=None, **changed):
        console = rich.console.Console(file=io.StringIO(), width=200)
        arguments = {"key": toy.key, "apply": toy.apply, "variables": toy.variables, "split": toy.split} | changed
        records = evaluate(
            *(arguments[name] for name in ("key", "apply", "variables", "split")),
            attacks=changed.get("attacks", toy.attacks),
            batch_size=batch_size,
            directory=directory,
            header={"seed": 7} if header is None else header,
            mesh=toy.mesh(devices),
            class_names=toy.names,
            console=console,
        )
        return records, console.file.getvalue()

    return call
