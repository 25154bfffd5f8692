"""What model-files.md asserts and shows; the names are the page's own."""

import modelsettings
import pictures
from pages import shown

# %% Models as files

tables = [
    pictures.table([f"in {file}", "supported", "what it does"], modelsettings.rows(file))
    for file in modelsettings.TABLES
]
shown("settings", "\n".join(tables))
