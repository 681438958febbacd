"""A split too large for the devices: grain's threads read its batches, and decode them, ahead of the steps."""

import contextlib
import functools
import os
from collections.abc import Iterator, Mapping

import jax
import numpy as np

from lt_adv.data import device_dataset
from lt_adv.data.dataset import Split

AHEAD = 2  # batches for each thread: one that it reads, one that waits


@contextlib.contextmanager
def batches(
    split: Split,
    key: jax.Array,
    first: int,
    total: int,
    own: np.ndarray,
    *,
    steps_per_epoch: int,
    batch_size: int,
    classes: Mapping[str, np.ndarray] | None = None,
    cycles: bool = False,
) -> Iterator[Iterator[dict[str, np.ndarray]]]:
    """The batches of the steps `first` to `total` - 1: the rows at `own` of those `device_dataset.batch_rows` draws.

    {"image" uint8 [k, h, w, c], "label" int32 [k], "index" int32 [k]} each, k = len(own). A batch is a function of
    (key, step) alone, whatever was read before. While the context is entered, threads read ahead.

    Errors: ValueError, with its name, for an image that cannot be read.
    """
    import grain  # a second, and not needed for a set that fits

    if len(split) and int(split.index.max()) > np.iinfo(np.int32).max:
        raise ValueError("Original indices above 2^31 - 1 do not fit the int32 they have on the devices.")

    options = {"num_examples": len(split), "batch_size": batch_size, "cycles": cycles}
    options["steps_per_epoch"] = steps_per_epoch
    compiled = jax.jit(functools.partial(device_dataset.epoch_indices, **options))

    @functools.lru_cache(maxsize=2)  # threads read across the end of an epoch
    def rows_of(epoch: int) -> np.ndarray:
        return np.asarray(compiled(key, epoch, classes))

    def batch(step: int) -> dict[str, np.ndarray]:
        rows = rows_of(step // steps_per_epoch)[step % steps_per_epoch][own]
        image = split.image[rows] if isinstance(split.image, np.ndarray) else split.image.read(rows)
        return {"image": image, "label": split.label[rows], "index": split.index[rows].astype(np.int32)}

    threads = min(os.cpu_count() or 1, 32)
    reading = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=AHEAD * threads)
    found = iter(grain.MapDataset.range(total).map(batch).to_iter_dataset(reading))
    found.set_state({"next_index": first})
    try:
        yield found
    finally:
        found.close()
