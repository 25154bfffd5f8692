"""What a LoRA must do, said once: for the layers here, for planted bugs, and for implementations of other people.

`claims` has the list. A claim is a function that raises `ClaimBroken` where it does not hold; `problems` has the arrays
that it is tried on.
"""
