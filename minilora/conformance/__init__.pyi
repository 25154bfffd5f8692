"""The public names of minilora.conformance."""

from .checking.check import check as check
from .report import CannotRun as CannotRun
from .report import Report as Report
