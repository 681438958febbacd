"""Prefetch of batches from host memory or files, with grain's threads, for splits too large for the devices."""

import contextlib
import functools
import os
from collections.abc import Iterator, Mapping

import jax
import numpy as np

from lt_adv.data import device_dataset
from lt_adv.data.dataset import Split, read_rows

BATCHES_PER_THREAD = 2  # one being read, one waiting


@contextlib.contextmanager
def batches(
    split: Split,
    key: jax.Array,
    first: int,
    total: int,
    local_rows: np.ndarray,
    *,
    steps_per_epoch: int,
    batch_size: int,
    classes: Mapping[str, np.ndarray] | None = None,
    cycles: bool = False,
    extra: device_dataset.ExtraDraws | None = None,
) -> Iterator[Iterator[dict[str, np.ndarray]]]:
    """Context of an iterator over the batches of the steps `first` to `total` - 1; threads prefetch inside the context.

    A batch is a function of (key, step): the rows `local_rows` of `device_dataset.batch_rows`. It does not depend on
    earlier reads.

    Args:
      split: the images.
      key: the key of the run.
      first: the first step.
      total: one more than the last step.
      local_rows: positions in the batch that this process reads, [k].
      steps_per_epoch: of the run.
      batch_size: over all processes.
      classes: as for `device_dataset.batch_rows`.
      cycles: as for `device_dataset.batch_rows`.
      extra: as for `device_dataset.batch_rows`.

    Yields:
      An iterator over {"image": uint8 [k, h, w, c], "label": int32 [k], "index": int32 [k]}.

    Raises:
      ValueError: for an image that cannot be read; the message names it.
    """
    import grain  # takes a second; not needed for a set that fits on the devices

    splits = device_dataset.with_extra(split, extra)
    epoch_indices = jax.jit(
        functools.partial(
            device_dataset.epoch_indices,
            steps_per_epoch=steps_per_epoch,
            num_examples=len(split),
            batch_size=batch_size,
            cycles=cycles,
            extra=extra,
        )
    )

    @functools.lru_cache(maxsize=2)  # at the end of an epoch, threads read batches of two
    def rows_of_epoch(epoch: int) -> np.ndarray:
        return np.asarray(epoch_indices(key, epoch, classes))

    def batch(step: int) -> dict[str, np.ndarray]:
        rows = rows_of_epoch(step // steps_per_epoch)[step % steps_per_epoch][local_rows]
        image, label, index = read_rows(splits, rows)
        return {"image": image, "label": label, "index": index.astype(np.int32)}

    threads = min(os.cpu_count() or 1, 32)
    read_options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=BATCHES_PER_THREAD * threads)
    iterator = iter(grain.MapDataset.range(total).map(batch).to_iter_dataset(read_options))
    iterator.set_state({"next_index": first})
    try:
        yield iterator
    finally:
        iterator.close()
