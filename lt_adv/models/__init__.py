"""Networks: `create(model_config, num_classes)` -> a flax module giving (logits, {"features"})."""

from lt_adv.models.classifier import Classifier, create

__all__ = ["Classifier", "create"]
