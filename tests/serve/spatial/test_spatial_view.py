import numpy as np
import pytest
from tenfold.serve.spatial.view import pack_view


@pytest.fixture
def write(tmp_path):
    """Return write(ids, **arrays) -> folder with results."""

    def make(ids, **arrays):
        (tmp_path / "domains.csv").write_text("id,domain\n" + "".join(f'"{name}",0\n' for name in ids), "utf-8")
        np.savez(tmp_path / "view.npz", **arrays)
        return tmp_path

    return make


def test_arrays_of_odd_length_and_names_of_any_kind_come_back(write, unpack_view):
    ids = ["a,b", "\u00fc", "c"]
    x, domain = np.array([1.5, -2, np.nan]), np.array([2, -1, 0])
    arrays, names, count = unpack_view(pack_view(write(ids, x=x, y=x, domain=domain, probability=x)))
    assert (names, count) == (ids, 3)
    np.testing.assert_array_equal(arrays["x"], x.astype(np.float32))
    np.testing.assert_array_equal(arrays["domain"], domain)
    assert set(arrays) == {"x", "y", "domain", "probability"}


@pytest.mark.parametrize("is_up", [True, False])
def test_the_direction_of_the_y_axis_is_told(write, is_up):
    one = np.zeros(1)
    packed = pack_view(write(["a"], x=one, y=one, domain=one, y_up=np.bool_(is_up)))
    assert f'"y_up": {str(is_up).lower()}'.encode() in packed
    assert b'"y_up": false' in pack_view(write(["a"], x=one, y=one, domain=one))


def test_arrays_that_do_not_fit_the_cells_are_an_error(write):
    with pytest.raises(ValueError, match="2 cells"):
        pack_view(write(["a", "b"], x=np.zeros(3), y=np.zeros(2), domain=np.zeros(2)))


def test_arrays_of_objects_are_never_unpickled(write):
    things = np.array([{}], dtype=object)
    with pytest.raises(ValueError, match="allow_pickle=False"):
        pack_view(write(["a"], x=things, y=np.zeros(1), domain=np.zeros(1)))
