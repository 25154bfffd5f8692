import os

import pytest


@pytest.fixture(autouse=True, scope="module")
def no_wait_for_the_disk():
    """Nobody pulls the plug here, and on a busy disk each fsync takes long. Processes of their own wait for it."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "fsync", lambda handle: None)
        yield
