"""The public names of minilora.conformance."""

from ..report import CannotRun as CannotRun
from ..report import Report as Report
from .checking.check import check as check
