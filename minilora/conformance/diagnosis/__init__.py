"""What an engine did with a person's own adapter, from the logits that it gave: ``minilora diagnose``.

It is the judging of the golden adapters for any model and any adapter: what each known mistake would give is computed
here, and not read from a file.

- `subject`: the adapter and the model, as the formulas of `minilora.conformance.golden` take them
- `mistakes`: what engines do wrong, a row each, for a model's own layers and widths
- `answering`: the logits of a model whose weights a mistake changed
- `diagnosing`: which of them the engine's logits are
"""
