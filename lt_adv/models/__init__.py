"""Networks: `create(model_config, num_classes)` -> a flax module giving (logits, {"features"})."""

from lt_adv.models.classifier import DTYPES, Classifier, create

__all__ = ["DTYPES", "Classifier", "create"]
