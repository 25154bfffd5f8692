"""What guards against hostile files and machines that die: a reader of the mathematics passes this room by.

`errors`: what is raised, and how a message shows text that came from a file. `tensorfile`: a safetensors file, its
header bounded. `wholefiles`: files put in their place whole or not at all, and locks. `boundedpatterns`: regular
expressions from a file, within a bound on the time. `rendering`: a chat template in a process of its own.
`machinememory`: how much memory this process may have.
"""
