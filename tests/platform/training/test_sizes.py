"""Which numbers of workers a job can use, and the rows of an epoch at each."""

import itertools

import pytest
from accelerate.data_loader import BatchSamplerShard, SeedableRandomSampler, prepare_data_loader, skip_first_batches
from tenfold.platform.errors import ConfigError
from tenfold.platform.experiment import Compute, Workers, load_experiment
from tenfold.platform.run import plan
from tenfold.platform.training.rows import EvenRows, LengthGroups
from tenfold.platform.training.sizes import accumulation_at, shares, usable_sizes
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler


@pytest.mark.parametrize(
    ("smallest", "largest", "accumulation", "expected"),
    [
        (2, 2, 1, (2,)),
        (1, 2, 1, (1, 2)),
        (1, 4, 1, (1, 2, 4)),
        (1, 4, 3, (1, 2, 3, 4)),
        (2, 3, 1, (3,)),
        (2, 3, 2, (2, 3)),
        (3, 8, 1, (4, 8)),
    ],
)
def test_sizes_that_share_a_step_equally_are_usable(smallest, largest, accumulation, expected):
    compute = Compute(workers=Workers(min=smallest, max=largest))
    assert usable_sizes(compute, accumulation) == expected
    for size in expected:
        assert size * accumulation_at(size, accumulation, largest) == accumulation * largest


def test_a_size_that_does_not_share_a_step_is_an_error_of_the_program():
    with pytest.raises(ValueError, match="3 forward passes of a step cannot be shared by 2 workers"):
        accumulation_at(2, 1, 3)


def batches_of(order, rows_per_batch, workers):
    """Return what accelerate deals out: for every round one batch of every worker."""
    dealt = BatchSampler(order, rows_per_batch, drop_last=False)
    if workers == 1:
        return list(dealt)
    each = [list(BatchSamplerShard(dealt, num_processes=workers, process_index=rank)) for rank in range(workers)]
    return [batch for batches in zip(*each, strict=True) for batch in batches]


@pytest.mark.parametrize("rows", [1, 3, 4, 5, 8, 9, 10, 11, 13])
def test_filling_up_an_epoch_is_what_accelerate_does_for_the_largest_size(rows):
    plain = SequentialSampler(range(rows))
    filled = EvenRows(plain, 2 * shares((1, 2)))
    assert len(list(filled)) == len(filled)
    two = batches_of(plain, 2, 2)
    assert batches_of(filled, 2, 2) == two
    assert batches_of(filled, 2, 1) == two


def test_rows_of_every_step_are_the_same_at_every_size_also_at_the_end_of_an_epoch():
    sizes, accumulation = (1, 2, 3, 4), 3
    filled = EvenRows(SequentialSampler(range(31)), 2 * shares(sizes))
    steps = {}
    for size in sizes:
        batches = batches_of(filled, 2, size)
        passes = size * accumulation_at(size, accumulation, 4)
        assert len(batches) % size == 0
        steps[size] = [sorted(itertools.chain(*batches[at : at + passes])) for at in range(0, len(batches), passes)]
    assert len(steps[4]) == 2
    assert all(found == steps[4] for found in steps.values())


def test_the_order_of_a_later_epoch_is_kept_where_its_first_batches_are_skipped():
    def dealt(workers, skipped):
        found = []
        for rank in range(workers):
            order = EvenRows(SeedableRandomSampler(range(10), data_seed=7), 4)
            rows = DataLoader(list(range(10)), batch_size=2, sampler=order)
            loader = prepare_data_loader(rows, num_processes=workers, process_index=rank, use_seedable_sampler=True)
            loader.set_sampler(order)  # as the Trainer does
            loader = skip_first_batches(loader, skipped) if skipped else loader
            loader.set_epoch(1)
            found.append([batch.tolist() for batch in loader])
        return [batch for batches in zip(*found, strict=True) for batch in batches]

    whole = dealt(2, 0)
    assert len(whole) == 6
    assert dealt(1, 0) == whole
    assert dealt(2, 1) == dealt(1, 2) == whole[2:]


def test_rows_of_like_length_come_in_an_order_that_seed_and_epoch_decide():
    order = LengthGroups([length % 7 for length in range(40)], 4, seed=3)
    first = list(order)
    assert sorted(first) == list(range(40))
    order.set_epoch(1)
    second = list(order)
    assert second != first
    order.set_epoch(0)
    assert list(order) == first
    even = EvenRows(order, 16)
    even.set_epoch(1)
    assert list(even) == [*second, *second[:8]]


def test_a_range_of_workers_is_the_same_run_as_its_largest_number():
    fixed, elastic = (load_experiment("dskd/demo", [f"compute.workers={w}"]) for w in ("2", "{min: 1, max: 2}"))
    assert elastic.run_id == fixed.run_id
    assert load_experiment("dskd/demo", ["compute.workers={min: 1, max: 3}"]).run_id != fixed.run_id
    assert elastic.resolved()["compute"]["workers"] == {"min": 1, "max": 2}


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("{min: 3, max: 2}", "needs min <= max; got min 3, max 2"),
        ("{min: 0, max: 2}", "compute.workers.min = 0"),
        ("{min: 1}", "compute.workers.max: missing"),
        ("{most: 2, min: 1, max: 2}", "compute.workers.most = 2: unknown key"),
        ("two", "compute.workers = 'two': Input should be a valid integer"),
    ],
)
def test_a_wrong_range_is_one_error(given, told):
    with pytest.raises(ConfigError) as raised:
        load_experiment("dskd/demo", [f"compute.workers={given}"])
    assert told in str(raised.value)
    assert "1 problem(s)" in str(raised.value)


def test_the_plan_says_which_sizes_are_used_and_refuses_a_range_of_one(tmp_path):
    places = [f"storage={tmp_path / 'runs'}", f"tracking.uri=sqlite:///{tmp_path / 'mlflow.db'}"]
    sections = plan(load_experiment("dskd/demo", [*places, "compute.workers={min: 1, max: 3}"]))
    rows = {section.title: dict(section.rows) for section in sections}
    assert rows["run"]["compute"].startswith("1 to 3 worker(s)")
    assert rows["elastic"] == {"config.training": "1, 3 workers"}
    with pytest.raises(ConfigError, match="only 3 workers can share a step"):
        plan(load_experiment("dskd/demo", [*places, "compute.workers={min: 2, max: 3}"]))
