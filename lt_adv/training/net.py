"""The network that a method calls during one traced step."""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax

from lt_adv.methods import DataInfo
from lt_adv.runtime.distributed import PyTree

AXIS = "data"


class Net:
    """`apply` with parameters and running statistics bound; see `lt_adv.methods.Net` for its methods.

    Each trace creates one. Networks derived from it share its running statistics: a forward pass with other parameters
    advances them too.
    """

    def __init__(
        self,
        apply: Callable[..., Any],
        params: PyTree,
        batch_stats: PyTree,
        info: DataInfo,
        *,
        key: jax.Array,
        teacher: PyTree = None,
        freeze_batch_stats: bool = False,
    ):
        self._apply = apply
        self._cell: dict[str, Any] = {"batch_stats": batch_stats, "forwards": 0}
        self._key = key  # of dropout, one per device; all other random numbers are drawn per example
        self._freeze = freeze_batch_stats
        self._writes, self._batch_statistics = True, False
        self.params = params
        self.info = info
        self.teacher: Callable[[jax.Array], Any] | None = None
        if teacher:
            self.teacher = lambda x: apply(teacher, x, train=False)

    @property
    def batch_stats(self) -> PyTree:
        return self._cell["batch_stats"]

    def _variables(self) -> dict[str, Any]:
        return {"params": self.params, "batch_stats": self.batch_stats}

    def __call__(self, x: jax.Array, *, train: bool) -> tuple[jax.Array, dict[str, jax.Array]]:
        if self._freeze or not (train or self._batch_statistics):
            return self._apply(self._variables(), x, train=False)
        rngs = {"dropout": jax.random.fold_in(self._key, self._cell["forwards"])}
        out, new = self._apply(self._variables(), x, train=True, mutable=["batch_stats"], rngs=rngs)
        if self._writes:
            self._cell.update(batch_stats=new["batch_stats"], forwards=self._cell["forwards"] + 1)
        return out

    def with_params(self, params: PyTree) -> "Net":
        return self._replace(params=params)

    def without_updates(self) -> "Net":
        return self._replace(_writes=False)

    def with_batch_statistics(self) -> "Net":
        return self._replace(_writes=False, _batch_statistics=True)

    def _replace(self, **changes: Any) -> "Net":
        net = Net.__new__(Net)
        net.__dict__.update(self.__dict__, **changes)
        return net

    def gather(self, tree: PyTree) -> PyTree:
        return jax.tree.map(lambda a: lax.all_gather(a, AXIS, tiled=True), tree)

    def mean(self, tree: PyTree) -> PyTree:
        return lax.stop_gradient(lax.pmean(tree, AXIS))
