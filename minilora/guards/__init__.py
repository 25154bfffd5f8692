"""What guards against hostile files and machines that die: a reader of the mathematics passes this room by.

Each file begins with what it promises, how that is kept, and which test shows it.

- `errors`: what is raised, and how a message shows text that came from a file
- `inputfiles`: files opened and JSON parsed with suspicion; `tensorfile`: a safetensors file, its header bounded
- `boundedprocess`: a program that came in a file runs in a process of its own, `answering`, bounded in time and memory;
  `boundedpatterns` with `patternanswers`: regular expressions; `templateanswers`: chat templates
- `wholefiles`: files put in their place whole or not at all; `folderlocks`: one process at a time
- `machinememory`: how much memory this process may have
"""
