"""Times the ways in which a site can be run, on its real shapes, and keeps what was the fastest on disk."""

from xfcompile.tuning.facts import Timings, Trial
from xfcompile.tuning.timer import Timer, measured_by
from xfcompile.tuning.tuner import Tuner

__all__ = ["Timer", "Timings", "Trial", "Tuner", "measured_by"]
