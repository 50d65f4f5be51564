"""The old name of `write` and `format`, until its last user has moved."""

from selfforcing_dfd.data.format import npy
from selfforcing_dfd.data.write import Job, Record, Refuse, write_folder

__all__ = ["Job", "Record", "Refuse", "npy", "write_folder"]
