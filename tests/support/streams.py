"""What a program prints to: a terminal, and a file of which a reader sees what was flushed."""

import io


class Terminal(io.StringIO):
    def isatty(self):
        return True


class File(io.StringIO):
    seen = ""

    def flush(self):
        self.seen = self.getvalue()
