"""Further members for the samples of a finished shard folder; all else stays as it is."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from selfforcing_dfd.data.format import INDEX_NAME, write_index
from selfforcing_dfd.data.journal import Job, Journal
from selfforcing_dfd.data.shards import ShardReader
from selfforcing_dfd.data.write import PackSummary, Record, shard_folder, summary_of, write_shards


def stored_records(reader: ShardReader, description: str) -> Iterator[Record]:
    """Every sample as it is stored, with a progress bar."""
    for number in tqdm(range(len(reader)), desc=description, unit="clip", disable=None):
        entry = reader.index.samples[number]
        members = reader.members(number)
        yield Record(number, entry.key, entry.caption, members, entry.captions)


def write_again(
    reader: ShardReader,
    records: Iterable[Record],
    out: Path | None,
    fingerprints: Mapping[str, str],
    about: Mapping[str, Any],
) -> PackSummary:
    """Write the records, which are the reader's samples in their order, with further members.

    fingerprints, about: what the index states beside what it stated before. The folder is replaced
    as a whole at the end; or left alone if `out` names another, which must not exist.
    """
    folder = reader.folder
    index = replace(
        reader.index,
        about=reader.index.about | dict(about),
        fingerprints=reader.index.fingerprints | dict(fingerprints),
    )
    job = Job(
        name=str(folder),
        num_items=len(reader),
        latent_shape=index.latent_shape,
        text_shape=index.text_shape,
        fingerprints=index.fingerprints,
        about=index.about,
        shard_size=sum(entry.shard == index.samples[0].shard for entry in index.samples),
    )
    with shard_folder(out or folder, overwrite=out is None) as partial:
        journal = Journal(partial, job)
        for path in folder.iterdir():
            if path.name != INDEX_NAME and path.suffix != ".tar":
                shutil.copyfile(path, partial / path.name)
        write_shards(partial, records, journal, refused={})
        index = replace(index, shards=tuple(journal.shards), samples=tuple(journal.samples))
        write_index(partial, index)
    return summary_of(out or folder, index)
