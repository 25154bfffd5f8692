"""What api.md shows."""

import api
from pages import shown

shown("modules", api.table())
