"""Agreement of partitions: worked numbers, definitions from the table of counts, unknown classes."""

import math

import numpy as np
import pandas as pd
import pytest
from tenfold.platform.errors import DataError
from tenfold.platform.evaluation.clustering import agreement

A, B = [0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 2, 2]


def test_worked_numbers():
    got = agreement(A, B)
    expected = {
        "ari": 0.242424,
        "nmi": 0.515804,
        "ami": 0.298792,
        "homogeneity": 0.666667,
        "completeness": 0.420620,
        "fmi": 0.471405,
        "v_measure": 0.515804,  # the harmonic mean of the two above, which is the NMI
        "purity": 5 / 6,  # groups of B: 2 of 2, 1 of 2, 2 of 2
    }
    assert got.keys() == expected.keys()
    assert got == pytest.approx(expected, abs=1e-6)


def test_rand_index_is_that_of_counted_pairs():
    generator = np.random.default_rng(0)
    truth, found = generator.integers(0, 3, 30), generator.integers(0, 4, 30)
    upper = np.triu_indices(30, 1)
    same, alike = (values[upper[0]] == values[upper[1]] for values in (truth, found))
    both, expected = (same & alike).sum(), same.sum() * alike.sum() / len(same)
    assert agreement(truth, found)["ari"] == pytest.approx(
        (both - expected) / ((same.sum() + alike.sum()) / 2 - expected)
    )


def test_information_is_divided_by_the_mean_entropy():
    table = np.array([[2, 1, 0], [0, 1, 2]]) / 6

    def entropy(shares):
        return -sum(share * math.log(share) for share in np.ravel(shares) if share)

    rows, columns = entropy(table.sum(axis=1)), entropy(table.sum(axis=0))
    information = rows + columns - entropy(table)
    assert agreement(A, B)["nmi"] == pytest.approx(information / ((rows + columns) / 2))
    assert agreement(A, B)["homogeneity"] == pytest.approx(information / rows)


def test_equal_partitions_agree_whatever_their_names():
    assert agreement(A, ["x", "x", "x", "y", "y", "y"]) == pytest.approx(dict.fromkeys(agreement(A, A), 1.0))


def test_names_do_not_change_agreement():
    renamed = [{0: "c", 1: "a", 2: "b"}[group] for group in B]
    assert agreement(A, renamed) == pytest.approx(agreement(A, B))


@pytest.mark.parametrize("missing", [None, float("nan"), np.nan, pd.NA])
def test_items_of_unknown_class_do_not_count(missing):
    truth = ["L1", missing, "L1", "L1", "L2", "L2", missing, "L2"]
    assert agreement(truth, [0, 9, 0, 1, 1, 2, 0, 2]) == pytest.approx(agreement(A, B))


def test_categories_are_taken_as_labels():
    truth = pd.Series(pd.Categorical(["a", "a", "a", "b", "b", "b", None], categories=["z", "b", "a"]))
    found = pd.Categorical([0, 0, 1, 1, 2, 2, 2])
    assert agreement(truth, found) == pytest.approx(agreement(A, B))


def test_one_group_tells_nothing_and_is_half_pure():
    got = agreement(A, [5] * 6)
    assert got["ari"] == got["nmi"] == got["homogeneity"] == 0
    assert got["purity"] == 0.5


def test_a_single_item_agrees():
    assert agreement(["a"], [3])["ari"] == 1


def test_lists_of_unequal_length_are_refused():
    with pytest.raises(DataError, match=r"\(6,\), predicted \(5,\)"):
        agreement(A, B[:5])


def test_no_known_class_is_refused():
    with pytest.raises(DataError, match="none of 2 items has a known class"):
        agreement([None, float("nan")], [0, 1])


def test_missing_group_of_a_known_class_is_refused():
    with pytest.raises(DataError, match="1 items with a known class have no predicted group"):
        agreement(["a", None, "b"], [None, None, 1])
