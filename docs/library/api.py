"""What api.md shows."""

import api
from pages import shown

shown("names", api.names())
shown("modules", api.table())
