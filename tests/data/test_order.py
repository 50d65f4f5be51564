"""The order of a data stream: every sample once per epoch, also after a resume."""

from __future__ import annotations

import itertools
import threading
from pathlib import Path

import pytest

from selfforcing_dfd.data.order import SampleOrder, batches, load_batch
from selfforcing_dfd.data.shards import Batch, ShardReader


def stream(order: SampleOrder, start: int, stop: int) -> list[int]:
    return [order.sample_at(position) for position in range(start, stop)]


def is_same(a: Batch, b: Batch) -> bool:
    return (
        a.keys == b.keys
        and a.captions == b.captions
        and a.latents.equal(b.latents)
        and a.text.equal(b.text)
    )


def test_order_is_a_function_of_seed_and_epoch() -> None:
    """Catches a shuffle that repeats every epoch, ignores the seed or has a memory."""
    order = SampleOrder(20, seed=0)
    again = SampleOrder(20, seed=0)
    backwards = [again.sample_at(position) for position in reversed(range(60))]
    assert stream(order, 0, 60) == backwards[::-1]
    epochs = [stream(order, 20 * epoch, 20 * epoch + 20) for epoch in range(3)]
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert stream(SampleOrder(20, seed=1), 0, 20) != epochs[0]


def test_order_of_seed_zero_is_pinned() -> None:
    """Catches another order after an update: a resumed run must go on with the same samples."""
    assert stream(SampleOrder(6, seed=0), 0, 12) == [5, 1, 4, 2, 0, 3, 4, 1, 2, 3, 0, 5]


def test_every_sample_comes_once_per_epoch() -> None:
    """Catches samples lost or doubled where epochs meet."""
    order = SampleOrder(20, 5)
    for epoch in range(8):
        assert sorted(stream(order, 20 * epoch, 20 * epoch + 20)) == list(range(20))


def test_an_empty_order_is_refused() -> None:
    """Catches a division by zero that does not say what is empty."""
    with pytest.raises(ValueError, match="num_samples is 0"):
        SampleOrder(0, 0)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_every_sample_once_per_epoch_for_any_number_of_ranks_and_workers(
    packed: Path, num_ranks: int, num_workers: int
) -> None:
    """Catches shards that are divided among ranks and workers, as webdataset does it.

    Each of them would see its own part of the data only.
    """
    reader = ShardReader(packed)
    order = SampleOrder(len(reader), seed=3)
    keys: list[str] = []
    for rank in range(num_ranks):
        starts = range(2 * rank, len(reader), 2 * num_ranks)
        read = batches(reader, order, starts, 2, num_workers)
        keys += [key for batch in read for key in batch.keys]
    assert sorted(keys) == sorted(entry.key for entry in reader.index.samples)


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_a_global_batch_does_not_depend_on_the_number_of_ranks(
    packed: Path, num_ranks: int
) -> None:
    """Catches an update that sees other samples on another number of processes."""
    reader = ShardReader(packed)
    order = SampleOrder(len(reader), seed=3)
    whole = load_batch(reader, order, start=6, size=6)
    size = 6 // num_ranks
    parts = [load_batch(reader, order, 6 + rank * size, size) for rank in range(num_ranks)]
    assert [key for part in parts for key in part.keys] == list(whole.keys)


def test_workers_change_nothing(packed: Path) -> None:
    """Catches batches that arrive in the order in which workers finish."""
    reader = ShardReader(packed)
    order = SampleOrder(len(reader), 3)
    alone = list(batches(reader, order, range(0, 24, 4), 4, num_workers=0))
    helped = list(batches(reader, order, range(0, 24, 4), 4, num_workers=2))
    assert len(alone) == len(helped) == 6
    assert all(is_same(a, b) for a, b in zip(alone, helped, strict=True))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resuming_at_a_cursor_gives_the_same_remaining_stream(
    packed: Path, num_workers: int
) -> None:
    """Catches any state beside the cursor.

    Batches of 5 from 12 samples straddle epochs at different places.
    """
    reader = ShardReader(packed)
    whole = list(batches(reader, SampleOrder(12, 3), range(0, 40, 5), 5))
    rest = list(batches(ShardReader(packed), SampleOrder(12, 3), range(20, 40, 5), 5, num_workers))
    assert all(is_same(a, b) for a, b in zip(whole[4:], rest, strict=True))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_endless_stream_is_read_only_a_little_ahead(packed: Path, num_workers: int) -> None:
    """Catches a loader that lists all starts first.

    The training loop asks for batches without end.
    """
    reader = ShardReader(packed)
    endless = batches(reader, SampleOrder(12, 3), itertools.count(0, 5), 5, num_workers)
    keys = [next(endless).keys for _ in range(3)]
    assert keys == [load_batch(reader, SampleOrder(12, 3), start, 5).keys for start in (0, 5, 10)]


def test_a_stream_that_is_dropped_leaves_no_threads(packed: Path) -> None:
    """Catches readers that stay behind. A run opens one stream for each stage and control arm."""
    before = threading.active_count()
    endless = batches(
        ShardReader(packed), SampleOrder(12, 3), itertools.count(0, 5), 5, num_workers=2
    )
    next(endless)
    assert threading.active_count() > before
    del endless
    assert threading.active_count() == before


def test_samples_are_set_aside_from_a_position_on() -> None:
    """Catches a sample set aside that moves others, comes back, or was left out before."""
    plain = SampleOrder(8, 3)
    whole = [plain.sample_at(position) for position in range(40)]
    bad = whole[20]
    order = SampleOrder(8, 3, aside={bad: 20})
    found = [order.sample_at(position) for position in range(40)]
    assert found[:20] == whole[:20]
    assert bad not in found[20:]
    others = [position for position in range(40) if whole[position] != bad]
    assert [found[position] for position in others] == [whole[position] for position in others]
    both = SampleOrder(8, 3, aside={bad: 20, found[20]: 20})
    assert not {bad, found[20]} & {both.sample_at(position) for position in range(20, 40)}
    with pytest.raises(ValueError, match="all 2 samples are set aside"):
        SampleOrder(2, 0, aside={0: 0, 1: 5})
