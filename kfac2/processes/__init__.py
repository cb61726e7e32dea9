"""Working alone or in a group of processes, one file for each."""

from kfac2.processes.alone import ALONE, Alone
from kfac2.processes.base import Part, Processes, Told
from kfac2.processes.choice import WORLD, check_plain, processes_of, unwrapped
from kfac2.processes.fingerprints import checksum, fingerprint

__all__ = [
    "ALONE",
    "WORLD",
    "Alone",
    "Part",
    "Processes",
    "Told",
    "check_plain",
    "checksum",
    "fingerprint",
    "processes_of",
    "unwrapped",
]
