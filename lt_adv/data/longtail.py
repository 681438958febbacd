"""Long-tailed subsets: images per class, selection of images, validation split, groups of classes.

Profiles: Cao et al., "Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss", NeurIPS 2019. The
selected images are those of the code of Wu et al., "Adversarial Robustness under Long-Tailed Distribution", CVPR 2021.
"""

import hashlib
from collections.abc import Sequence
from typing import TypedDict, Unpack, cast

import numpy as np

from lt_adv.data import split_file
from lt_adv.data.dataset import Dataset, LongTailed, format_classes
from lt_adv.runtime import registry

PROFILES = ("exponential", "step", "balanced", "none")
ORIGINS = ("train", "unused")  # of a validation split
GROUPS = ("thirds", "reat", "robustlt", "tenths")


class Profile(TypedDict, total=False):
    """The options of `class_counts`."""

    imbalance_ratio: float
    balanced_fraction: float
    imbalance: str


def class_counts(
    num_classes: int,
    max_count: int,
    *,
    imbalance: str = "exponential",
    imbalance_ratio: float = 50.0,
    balanced_fraction: float = 0.1,
) -> np.ndarray:
    """Returns the images per class of a profile, in label order, int64 [C].

        exponential  n_i = int(n_max f^(i / (C - 1))), f = 1 / imbalance_ratio
        step         n_i = int(n_max) for the first C // 2 classes, int(n_max f) for the others
        balanced     n_i = int(n_max balanced_fraction)

    Differs from the released code: its step profile drops the last class of an odd number of classes.

    Args:
      num_classes: C.
      max_count: n_max.
      imbalance: name of the profile.
      imbalance_ratio: max count / min count, at least 1.
      balanced_fraction: in (0, 1].

    Raises:
      ValueError: if a class would have no images.
    """
    if imbalance not in PROFILES[:3]:
        raise registry.unknown("imbalance", imbalance, PROFILES)
    if num_classes < 2:
        raise ValueError(f"A long tail needs at least 2 classes, not {num_classes}.")
    if imbalance == "balanced":
        if not 0 < balanced_fraction <= 1:
            raise ValueError(f"balanced_fraction must be in (0, 1], not {balanced_fraction}.")
        counts = [int(max_count * balanced_fraction)] * num_classes
        cause = f"balanced_fraction {balanced_fraction}"
    else:
        factor = 1 / _checked_ratio(imbalance_ratio)
        if imbalance == "exponential":
            counts = [int(max_count * factor ** (i / (num_classes - 1))) for i in range(num_classes)]
        else:
            counts = [int(max_count * (1 if i < num_classes // 2 else factor)) for i in range(num_classes)]
        cause = f"imbalance_ratio {imbalance_ratio}"
    if min(counts) < 1:
        raise ValueError(
            f"{cause} leaves class {counts.index(min(counts))} without images when the largest class has {max_count}."
        )
    return np.array(counts, np.int64)


def _checked_ratio(imbalance_ratio: float) -> float:
    if not 1 <= imbalance_ratio < float("inf"):
        hint = ""
        if 0 < imbalance_ratio < 1:
            hint = f": the literature's {imbalance_ratio:g} is ratio {1 / imbalance_ratio:g}"
        raise ValueError(f"imbalance_ratio is max count / min count, so it must be >= 1, not {imbalance_ratio}{hint}.")
    return imbalance_ratio


def check_no_empty_class(counts: Sequence[int] | np.ndarray, class_names: Sequence[str], source: str) -> None:
    """Raises ValueError, with their names, if classes of `source` have no training image; `counts` is [C]."""
    if len(empty := np.flatnonzero(np.asarray(counts) == 0)):
        raise ValueError(
            f"The class {class_names[empty[0]]!r} has no training image. The training split of {source} has no "
            f"{format_classes(empty, class_names)}: remove such classes or add images."
        )


def _describe_class(c: int, class_names: Sequence[str]) -> str:
    return format_classes([c], class_names) if class_names else f"class {c}"


def select(
    label: np.ndarray, counts: Sequence[int] | np.ndarray, seed: int = 0, class_names: Sequence[str] = ()
) -> np.ndarray:
    """Returns the positions of randomly selected images, int64 [sum(counts)], class by class in the order drawn.

    One `np.random.RandomState` is used for all classes in order. It shuffles the ascending positions of a class, of
    which the first `counts[c]` are selected.

    Args:
      label: [n].
      counts: images to select of each class.
      seed: of the generator.
      class_names: for error messages.

    Raises:
      ValueError: for a wrong number of counts, a count below 1, or a count above the images of the class.
    """
    label = np.asarray(label)
    num_classes = int(label.max()) + 1
    if len(counts) != num_classes:
        raise ValueError(f"class_counts has {len(counts)} entries, the data set has {num_classes} classes.")
    rng = np.random.RandomState(seed)
    chosen = []
    for c, count in enumerate(counts):
        positions = np.flatnonzero(label == c)
        if count != int(count) or count < 1:
            described = _describe_class(c, class_names)
            raise ValueError(f"class_counts must be whole numbers from 1, but {described} has {count}.")
        if count > len(positions):
            described = _describe_class(c, class_names).replace("class", "Class", 1)
            raise ValueError(f"{described} has {len(positions)} images, fewer than the {count} of class_counts.")
        rng.shuffle(positions)
        chosen.append(positions[: int(count)])
    return np.concatenate(chosen).astype(np.int64)


def split_validation(
    label: np.ndarray,
    selected: np.ndarray,
    per_class: int,
    seed: int = 0,
    origin: str = "train",
    class_names: Sequence[str] = (),
) -> tuple[np.ndarray, np.ndarray]:
    """Splits off a balanced validation set; returns the positions of (train, validation), in the order of `selected`.

    Args:
      label: [n].
      selected: positions of the long-tailed subset.
      per_class: validation images of each class.
      seed: of the generator.
      origin: "train" takes them from `selected`; "unused" takes them from the images outside `selected` first, so that
        rare classes lose none.
      class_names: for error messages.

    Raises:
      ValueError: if a class would have no training image.
    """
    if per_class != int(per_class) or per_class < 0:
        raise ValueError(f"validation_per_class must be a whole number from 0, not {per_class}.")
    rng = np.random.RandomState(seed)
    label, used, held_out = np.asarray(label), np.zeros(len(label), bool), np.zeros(len(label), bool)
    used[selected] = True
    for c in np.unique(label[selected]):
        members = selected[label[selected] == c]
        order = rng.permutation(members)
        if origin == "unused":
            order = np.concatenate([rng.permutation(np.flatnonzero(~used & (label == c))), order])
        if len(order) - per_class < 1 or np.all(np.isin(members, order[:per_class])):
            raise ValueError(
                f"validation_per_class {per_class} leaves no training image of {_describe_class(c, class_names)}, "
                f"which has {len(members)}."
            )
        held_out[order[:per_class]] = True
    positions = np.concatenate([selected, np.flatnonzero(~used)])
    return selected[~held_out[selected]], positions[held_out[positions]]


def resample_balanced(label: np.ndarray, selected: np.ndarray, share: float, seed: int = 0) -> np.ndarray:
    """Resamples `selected` to floor(share n_max) images of every class; returns positions, class by class.

    Larger classes are subsampled without replacement. In smaller classes images are repeated; the repetitions of two
    images differ by at most one.

    Raises:
      ValueError: for a share outside (0, 1], or one that leaves no images.
    """
    if not 0 < share <= 1:
        raise ValueError(f"resample_balanced must be a share of the largest class, in (0, 1], not {share}.")
    chosen_label = np.asarray(label)[selected]
    members = [selected[chosen_label == c] for c in np.unique(chosen_label)]
    largest = max(map(len, members))
    count = int(share * largest)
    if not count:
        raise ValueError(f"resample_balanced {share} leaves no image of a class: the largest has {largest}.")
    rng = np.random.RandomState(seed)
    return np.concatenate([np.resize(rng.permutation(m), count) for m in members])


def groups(class_counts: Sequence[int], definition: str = "thirds") -> dict[str, np.ndarray]:
    """Returns {"head": ids, "body": ids, "tail": ids}: class ids by count, largest first, ties in label order.

    thirds    head and tail are C // 3 classes each, body the rest
    reat      tail is ranks 2 (C // 3) + 1 to C - 1, head the first C // 3 (Li et al., 2023)
    robustlt  tail is the 80 % rarest classes, head the rest, no body (CVPR 2026)
    tenths    ten blocks of C / 10 classes, "1" the most common (CIFAR-100 tables)
    """
    counts = np.asarray(class_counts)
    ranked, third = np.argsort(-counts, kind="stable"), len(counts) // 3
    if definition == "tenths":
        return {str(i + 1): block for i, block in enumerate(np.array_split(ranked, 10))}
    if definition == "thirds":
        first, last = third, len(counts) - third
    elif definition == "reat":
        first, last = third, min(2 * third + 1, len(counts))
    elif definition == "robustlt":
        first = last = len(counts) - round(0.8 * len(counts))
    else:
        raise registry.unknown("group definition", definition, GROUPS)
    return {"head": ranked[:first], "body": ranked[first:last], "tail": ranked[last:]}


def largest_count(sizes: np.ndarray, class_names: Sequence[str] = (), **profile: Unpack[Profile]) -> int:
    """Returns the largest n_max whose profile does not exceed the images per class, `sizes` [C] in label order.

    For a balanced set this is the size of its classes, as in the released code.

    Raises:
      ValueError: if there is none, because the profile leaves a class without images, or needs more images of a class
        than it has; the message names the class.
    """
    smallest: np.ndarray | None = None  # profile that was tried
    for max_count in range(int(sizes.max()), 0, -1):
        try:
            counts = class_counts(len(sizes), max_count, **profile)
        except ValueError:
            if smallest is None:  # already with the size of the largest class
                raise
            break
        if np.all(counts <= sizes):
            return max_count
        smallest = counts
    if smallest is None:
        raise ValueError("There are no training images.")
    short = np.flatnonzero(smallest > sizes)[0]
    raise ValueError(
        f"The profile ({', '.join(f'{k} {v}' for k, v in profile.items())}) needs at least {smallest[short]} images of "
        f"{_describe_class(short, class_names)}, which has {sizes[short]}: with fewer, another class would have none."
    )


def long_tailed(dataset: Dataset, data_config: registry.Config) -> LongTailed:
    """Returns the long-tailed subset of `dataset` that `data_config` describes; the test split is unchanged.

    Selects training images by a split file or the profile, splits off the validation set, and resamples the rest if the
    config says so.

    Args:
      dataset: the complete data set.
      data_config: keys class_counts (explicit counts, instead of a profile), imbalance ("none"), imbalance_ratio,
        balanced_fraction, split_file (a file for `split_file.read`; its images must have the class counts of the
        profile, unless that is "none"), validation_per_class (0), validation_from ("train"), resample_balanced (the
        share for the function of this name, or 0), split_seed (0).

    Raises:
      ValueError: in one line, for a config that the data set cannot fulfil.
    """
    label, num_classes = dataset.train.label, len(dataset.class_names)
    sizes = np.bincount(label, minlength=num_classes)
    seed = data_config.get("split_seed", 0)
    explicit = tuple(data_config.get("class_counts") or ())
    imbalance = data_config.get("imbalance", "none")
    _checked_ratio(data_config.get("imbalance_ratio", 1.0))
    if explicit or imbalance != "none":
        check_no_empty_class(sizes, dataset.class_names, dataset.name)
    profile = cast(Profile, {k: data_config[k] for k in Profile.__annotations__ if k in data_config})
    counts: Sequence[int] | np.ndarray | None = explicit or None
    if not explicit and imbalance != "none":
        counts = class_counts(num_classes, largest_count(sizes, dataset.class_names, **profile), **profile)
    file = split_file.read(data_config["split_file"]) if data_config.get("split_file") else None
    if file:
        selected = split_file.positions(file, dataset.train.index)
        _check_split_file(file, np.bincount(label[selected], minlength=num_classes), counts, dataset, data_config)
    elif counts is None:
        selected = np.arange(len(label))
    else:
        selected = select(label, counts, seed, dataset.class_names)
    before = np.bincount(label[selected], minlength=num_classes)
    per_class, origin = data_config.get("validation_per_class", 0), data_config.get("validation_from", "train")
    train_positions, held_out = split_validation(label, selected, per_class, seed, origin, dataset.class_names)
    share = data_config.get("resample_balanced", 0.0)
    if share:
        train_positions = resample_balanced(label, train_positions, share, seed)

    # The complete training set stays memory-mapped instead of being copied.
    complete = counts is None and not file and not len(held_out) and not share
    train = dataset.train if complete else dataset.train.take(train_positions)
    digest = hashlib.sha256(dataset.digest.encode())
    for positions in (train_positions, held_out):
        digest.update(str(len(positions)).encode() + positions.astype("<i8").tobytes())
    return LongTailed(
        train=train,
        validation=dataset.train.take(held_out) if len(held_out) else None,
        test=dataset.test,
        class_names=dataset.class_names,
        class_counts=tuple(np.bincount(label[train_positions], minlength=num_classes).tolist()),
        class_counts_before=tuple(before.tolist()),
        digest=digest.hexdigest(),
        split_file=file.description if file else "",
    )


def _check_split_file(
    file: split_file.SplitFile,
    counts: np.ndarray,
    expected: Sequence[int] | np.ndarray | None,
    dataset: Dataset,
    data_config: registry.Config,
) -> None:
    """Raises ValueError if a class has no image in a file, or another number than the config expects."""
    check_no_empty_class(counts, dataset.class_names, str(file.path))
    if expected is None or np.array_equal(expected, counts):
        return
    if len(expected) != len(counts):
        raise ValueError(f"class_counts has {len(expected)} entries, the data set has {len(counts)} classes.")
    wrong = np.flatnonzero(np.asarray(expected) != counts)
    first = wrong[0]
    source, remedy = "the profile of data.imbalance", "correct the profile, or set data.imbalance=none"
    if data_config.get("class_counts"):
        source, remedy = "data.class_counts", "leave it out"
    raise ValueError(
        f"{file.path} has {counts[first]} images of {_describe_class(first, dataset.class_names)}, but {source} gives "
        f"{expected[first]} (another number for {len(wrong)} of {len(counts)} classes): {remedy}."
    )
