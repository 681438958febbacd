"""A network for unit tests of a method's loss: one device, and logits from a plain function."""


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
