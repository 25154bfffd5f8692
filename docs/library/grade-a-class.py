"""What grade-a-class.md says."""

# %% Grade a class

import importlib
import re
from pathlib import Path

from pages import says

grader = importlib.import_module("grade_class")
default = re.search(r'"--seconds", type=float, default=(\d+)', Path(grader.__file__).read_text(encoding="utf-8"))
says(f"the import and each exercise: {default[1]} by default.")
