"""Networks: `create(model_config, num_classes)` returns a flax module: images -> (logits, {"features"})."""

from lt_adv.models.classifier import DTYPES, Classifier, create

__all__ = ["DTYPES", "Classifier", "create"]
