"""Agreement of found groups with known ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from tenfold.platform.errors import DataError


def agreement(truth: Sequence[Any] | np.ndarray, predicted: Sequence[Any] | np.ndarray) -> dict[str, float]:
    """Compare groups with known classes, over the items whose class is known.

    All are 1 for equal partitions, whatever the names of the groups (`fmi` is 0 where no two share one). `ari` is
    the adjusted Rand index, `nmi` and `ami` the (adjusted) mutual information over the arithmetic mean of the
    entropies, `v_measure` the harmonic mean of `homogeneity` and `completeness`, `fmi` the Fowlkes-Mallows index,
    `purity` the share of items in their group's most frequent class.

    Args:
        truth: class of each item; None, NaN and pandas.NA are unknown.
        predicted: group of each item, the same length; none may be missing where the class is known.

    Returns:
        `ari`, `nmi`, `ami`, `homogeneity`, `completeness`, `v_measure`, `fmi`, `purity`.

    Raises:
        DataError: unequal lengths, no known class, or a missing group.
    """
    from sklearn import metrics

    classes, groups = _codes(truth, predicted)
    homogeneity, completeness, v_measure = metrics.homogeneity_completeness_v_measure(classes, groups)
    values = {
        "ari": metrics.adjusted_rand_score(classes, groups),
        "nmi": metrics.normalized_mutual_info_score(classes, groups),
        "ami": metrics.adjusted_mutual_info_score(classes, groups),
        "homogeneity": homogeneity,
        "completeness": completeness,
        "v_measure": v_measure,
        "fmi": metrics.fowlkes_mallows_score(classes, groups),
        "purity": metrics.cluster.contingency_matrix(classes, groups).max(axis=0).sum() / len(classes),
    }
    return {name: float(value) for name, value in values.items()}


def _codes(truth: Any, predicted: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return class and group of the items whose class is known, as integers from 0."""
    import pandas as pd

    classes, groups = np.asarray(truth, dtype=object), np.asarray(predicted, dtype=object)
    if classes.shape != groups.shape or classes.ndim != 1:
        raise DataError(f"truth has shape {classes.shape}, predicted {groups.shape}; needs two equally long lists")
    known = ~pd.isna(classes)
    if not known.any():
        raise DataError(f"none of {len(classes)} items has a known class; name the column that holds the classes")
    class_codes, group_codes = pd.factorize(classes[known])[0], pd.factorize(groups[known])[0]
    missing = int((group_codes < 0).sum())
    if missing:
        raise DataError(f"{missing} items with a known class have no predicted group; leave them out of both lists")
    return class_codes, group_codes
