"""A network for unit tests of a method's loss: one device, and logits from a plain function."""

from lt_adv.methods import Batch


class FakeNet:
    """Calls `forward(x) -> (logits, outputs)` in either mode and counts nothing; `attributes` such as `info`."""

    def __init__(self, forward, **attributes):
        self._forward = forward
        self.__dict__.update(attributes)

    def __call__(self, x, *, train):
        return self._forward(x)

    def gather(self, tree):
        return tree

    def mean(self, tree):
        return tree

    def with_batch_statistics(self):
        return self


def make_batch(**fields):
    """Returns a batch in which other fields are None."""
    return Batch(**{"image": None, "label": None, "index": None, "eps": None, "step_size": None, **fields})
