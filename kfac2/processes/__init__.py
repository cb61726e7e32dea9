"""Working alone or in a group of processes, one file for each."""

from kfac2.processes.alone import Alone, check_alone
from kfac2.processes.base import Processes

__all__ = ["Alone", "Processes", "check_alone"]
