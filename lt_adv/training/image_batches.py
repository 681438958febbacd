"""Fixed images on the devices in full batches, with a random key per image: what validation and feedback attack."""

from collections.abc import Iterator

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lt_adv.attacks.initialization import threefry
from lt_adv.data.dataset import Images
from lt_adv.runtime import distributed
from lt_adv.training.net import AXIS


class ImageBatches:
    """Images and labels, split over all devices. The last batch is padded with the first image.

    Args:
        image: uint8 [n, h, w, c].
        label: int [n].
        mesh: all devices.
        batch_size: over all devices.

    Attributes:
        num_images: n.
        label: int [batches, batch_size], on the devices.
        over_devices: the sharding of a batch.
    """

    def __init__(self, image: Images, label: np.ndarray, *, mesh: Mesh, batch_size: int):
        self.num_images = len(label)
        size = -(-min(batch_size, len(label)) // mesh.size) * mesh.size
        rows = np.concatenate([np.arange(len(label)), np.zeros(-len(label) % size, np.int64)]).reshape(-1, size)
        image = np.asarray(image)
        shape, image = image.shape[1:], image[rows].reshape(*rows.shape, -1)  # flat images, as in `device_dataset.put`
        columns = image, np.asarray(label)[rows], rows.astype(np.int32)
        self._columns = distributed.device_put(columns, NamedSharding(mesh, PartitionSpec(None, AXIS)))
        self.label = self._columns[1]
        self.over_devices = NamedSharding(mesh, PartitionSpec(AXIS))
        self._replicated = distributed.replicated(mesh)

        def take(columns: tuple[jax.Array, ...], key: jax.Array, i: int) -> tuple[jax.Array, jax.Array, jax.Array]:
            image, label, row = (column[i] for column in columns)
            keys = jax.vmap(jax.random.fold_in, (None, 0))(key, row)
            return image.reshape(-1, *shape).astype(float) / 255, label, keys

        self._take = jax.jit(take, out_shardings=self.over_devices)

    def batches(self, key: jax.Array) -> Iterator[tuple[jax.Array, jax.Array, jax.Array]]:
        """Yields (images [b, h, w, c] in [0, 1], labels [b], keys [b]); an image's key is a function of `key` and row.

        Args:
            key: equal in all processes.
        """
        key = distributed.device_put(threefry(key), self._replicated)
        for i in range(len(self.label)):
            yield self._take(self._columns, key, i)
