"""Accuracies during training: clean on a sample of the training images, clean and PGD-20 on the validation split."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lt_adv import attacks
from lt_adv.attacks.initialization import threefry
from lt_adv.runtime import distributed
from lt_adv.training.net import AXIS


class Monitor:
    """`monitor(variables) -> {"clean/accuracy": ..., "pgd20/accuracy_tail": ...}` on fixed images.

    "accuracy", also by group, is the mean over images; "balanced_accuracy" that over the classes that have any.

    `apply(variables, x) -> logits` holds the post-hoc adjustment, as in the evaluation. `attack` holds the options of
    PGD (None: clean only); images are padded to whole batches and the padding is masked.
    """

    def __init__(
        self,
        key: jax.Array,
        apply: Callable[[Any, jax.Array], jax.Array],
        image: np.ndarray,
        label: np.ndarray,
        *,
        groups: Mapping[str, np.ndarray],
        mesh: Mesh,
        batch_size: int,
        attack: Mapping[str, Any] | None = None,
    ):
        size = -(-min(batch_size, len(label)) // mesh.size) * mesh.size
        padding = -len(label) % size
        self._label, self._groups = np.asarray(label), groups
        spread = NamedSharding(mesh, PartitionSpec(None, AXIS))
        rows = np.concatenate([np.arange(len(label)), np.zeros(padding, np.int64)]).reshape(-1, size)
        image = np.asarray(image)
        shape, image = image.shape[1:], image[rows].reshape(*rows.shape, -1)  # rows, as `device_dataset.put` has them
        label = self._label[rows]
        keys = jax.vmap(jax.random.fold_in, (None, 0))(threefry(key), jnp.asarray(rows.reshape(-1))).reshape(rows.shape)
        self._batches = distributed.device_put((image, label, keys), spread)

        self._everywhere = distributed.replicated(mesh)  # every process counts
        # Nothing is exchanged before all batches are done: programs that exchange must not be in flight side by side.
        shard = NamedSharding(mesh, PartitionSpec(AXIS))
        self._predict = jax.jit(lambda variables, x: attacks.prediction(apply(variables, x)), out_shardings=shard)
        self._attacks: dict[str, Any] = {"clean": None}
        if attack is not None:
            self._attacks[f"pgd{attack['num_steps']}"] = attacks.jit(attacks.pgd, apply, **attack)

        @jax.jit
        def take(batches: Any, i: int) -> Any:
            image, label, keys = (column[i] for column in batches)
            return image.reshape(-1, *shape).astype(float) / 255, label, keys

        self._take = take

    def __call__(self, variables: Any) -> dict[str, float]:
        result = {}
        for name, attack in self._attacks.items():
            predictions = []
            for i in range(self._batches[1].shape[0]):
                x, y, keys = self._take(self._batches, i)
                predictions.append(self._predict(variables, x if attack is None else attack(keys, variables, x, y)))
            whole = [np.asarray(distributed.replicate(p, self._everywhere)) for p in predictions]
            right = np.concatenate(whole)[: len(self._label)] == self._label
            result[f"{name}/accuracy"] = float(right.mean())
            classes = np.unique(self._label)
            result[f"{name}/balanced_accuracy"] = float(np.mean([right[self._label == c].mean() for c in classes]))
            for group, classes in self._groups.items():
                member = np.isin(self._label, classes)
                if member.any():
                    result[f"{name}/accuracy_{group}"] = float(right[member].mean())
        return result
