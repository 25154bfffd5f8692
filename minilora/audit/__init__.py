"""An adapter's files looked at from outside: is it applied, and is it right? ``minilora audit`` prints the answer."""
