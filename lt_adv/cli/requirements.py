"""Checks that the packages of the extra `train` are installed. Imports the standard library only."""

import importlib.util
import sys

# The modules of the packages that setup.cfg lists under `train`.
TRAIN_MODULES = (
    "flax", "optax", "orbax", "ml_collections", "absl", "etils", "tensorflow_datasets", "importlib_resources",
    "array_record", "grain", "PIL", "sklearn", "matplotlib", "rich",
)  # fmt: skip


def require_training_packages() -> None:
    """Exits with code 2 and one line on stderr if a package of the extra `train` is missing."""
    missing = [name for name in TRAIN_MODULES if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f'Error: lt_adv.main needs the training packages: pip install "lt_adv[train]" (in a clone: '
            f'pip install -e ".[train]"). Missing: {", ".join(missing)}.',
            file=sys.stderr,
        )
        sys.exit(2)
