"""The order of a data stream: every sample once per epoch, also after a resume."""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from pathlib import Path

import pytest

from selfforcing_dfd.data.shards import Batch, SampleOrder, ShardReader, batches, load_batch

CAPTIONS = [0] * 9 + [1] * 6 + [2] * 4 + [3]  # 20 samples


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


@pytest.mark.parametrize("group_size", [1, 2, 3, 4, 7, 32])
def test_every_sample_comes_once_per_epoch(group_size: int) -> None:
    """Catches samples lost or doubled when captions are cut into groups.

    Also in epochs that start within a group.
    """
    order = SampleOrder(20, 5, CAPTIONS, group_size)
    for epoch in range(8):
        assert sorted(stream(order, 20 * epoch, 20 * epoch + 20)) == list(range(20))


@pytest.mark.parametrize("group_size", [2, 3, 4])
def test_aligned_runs_share_a_caption_as_far_as_counts_allow(group_size: int) -> None:
    """Catches runs of one caption that are no longer aligned in later epochs.

    That happens where the group size does not divide the number of samples. Assignment within a
    caption needs several samples of it in one micro-batch.
    """
    order = SampleOrder(20, 5, CAPTIONS, group_size)
    possible = sum(count // group_size for count in Counter(CAPTIONS).values())
    for epoch in range(12):
        first = -(-20 * epoch // group_size) * group_size
        runs = [
            stream(order, start, start + group_size)
            for start in range(first, 20 * epoch + 20, group_size)
        ]
        whole = sum(len({CAPTIONS[sample] for sample in run}) == 1 for run in runs)
        # To reach a multiple of the group size, an epoch may have to break one group, and its end
        # may cut off another.
        assert whole >= possible - (0 if 20 % group_size == 0 else 2)


def test_what_is_left_of_each_caption_stays_together() -> None:
    """Catches leftovers in random order, which pair with nothing."""
    order = SampleOrder(20, 5, CAPTIONS, group_size=4)
    left = [CAPTIONS[sample] for sample in stream(order, 16, 20)]
    assert sorted(left) == [0, 1, 1, 3]
    assert len(list(itertools.groupby(left))) == 3


def test_groups_are_shuffled() -> None:
    """Catches groups in order of caption.

    The first updates of each epoch would see one caption only.
    """
    order = SampleOrder(20, 5, CAPTIONS, group_size=2)
    firsts = {
        tuple(CAPTIONS[sample] for sample in stream(order, 20 * epoch, 20 * epoch + 20))
        for epoch in range(4)
    }
    assert len(firsts) == 4


def test_members_of_a_group_change_between_epochs() -> None:
    """Catches groups formed once and only shuffled as wholes."""
    order = SampleOrder(20, 5, CAPTIONS, group_size=2)
    pairs = [
        {
            frozenset(stream(order, start, start + 2))
            for start in range(20 * epoch, 20 * epoch + 20, 2)
        }
        for epoch in range(2)
    ]
    assert len(pairs[0] & pairs[1]) < 5


@pytest.mark.parametrize(
    ("group", "message"),
    [
        (None, "group_size 2 needs 20 caption ids, one per sample; got no ids"),
        ([0, 1], "got 2 ids"),
    ],
)
def test_groups_without_captions_are_refused(group: list[int] | None, message: str) -> None:
    """Catches an IndexError hours into a run, or grouping by the wrong list."""
    with pytest.raises(ValueError, match=message):
        SampleOrder(20, 0, group, group_size=2)


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
    order = SampleOrder(len(reader), 3, reader.caption_ids, group_size=2)
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


def test_caption_ids_are_equal_where_captions_are(packed: Path) -> None:
    """Catches ids by position or by hash, which differ between processes."""
    reader = ShardReader(packed)
    for a, b in itertools.combinations(range(len(reader)), 2):
        assert (reader.caption_ids[a] == reader.caption_ids[b]) == (
            reader.captions[a] == reader.captions[b]
        )
    assert len(set(reader.caption_ids)) > 1
