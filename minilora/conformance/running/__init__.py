"""Foreign code, found and run where it can do no harm.

- `target`: finds the module or the file that is named on a command line
- `child_process`: checks in a process of its own, whatever foreign code does there
"""
