"""Every public default, written down once: a default that changes changes what people compute.

A change here belongs into the changelog. What each value is for stands in the docstring or the help text.
"""

import argparse
import dataclasses
import inspect
from importlib import import_module

import minilora
from minilora.cli import _parser

MORE = (
    "article",
    "conformance.report",
    "conformance.suite",
    "conformance.xfails",
    "fast.accumulation",
    "fast.residual",
    "files.checkpoint",
    "files.inspection",
    "language.chat",
    "language.chattemplate",
    "language.examples",
    "language.generation",
    "language.llamasave",
    "language.memory",
    "language.modelfiles.ggufblocks",
    "language.text",
    "language.tokenizer",
    "layer",
    "layers.nf4",
    "training",
    "variants.pissa",
    "variants.scaling",
    "variants.sums",
    "verify.selfcheck",
)
"""Modules with public names that `minilora` itself does not have."""

PYTHON = {
    "Adam": "lr=0.001, betas=(0.9, 0.999), eps=1e-08",
    "Adapter": "kind='linear', kernel=(), use_rslora=False, start=None",
    "DoRAAdapter": "kind='linear', kernel=(), use_rslora=False, start=None, dora_norm='constant'",
    "Backend.asarray": "dtype=None",
    "Conv1d": "bias=None, stride=1, padding=0, dilation=1, groups=1",
    "Conv2d": "bias=None, stride=1, padding=0, dilation=1, groups=1",
    "GatedMLP": "act_fn=SiLU()",
    "GradReport": "note=''",
    "History": "epochs=list(), losses=list()",
    "Linear": "bias=None",
    "Linear.init": "bias=True, dtype='float32', backend=None",
    "Llama.extend": "past=None",
    "Llama.load": "dtype='float32', backend=None, keep_blocks=False",
    "LlamaConfig": "tie_word_embeddings=False, attention_bias=False, mlp_bias=False, rope=None, "
    "model_type='llama', max_position_embeddings=None",
    "LoRA.init": "dtype='float32', backend=None",
    "MLP.init": "activation='relu', dtype='float32', backend=None",
    "QuantizedLinear": "bias=None, block_size=64, nested_absmax=None, mean=0.0, dtype='float32'",
    "QuantizedLinear.from_linear": "block_size=64, double_quant=True",
    "RMSNorm": "eps=1e-06",
    "Rotary.forward": "start=0",
    "TrainingDiverged": "epoch=0, step=0",
    "adapt": "use_rslora=False, use_dora=False, dora_norm='constant', init='lora'",
    "best_adapter": "alpha=1.0",
    "best_adapter_from_gram": "alpha=1.0",
    "cross_entropy": "out=None",
    "dequantize_nf4": "block_size=64, dtype='float32'",
    "evaluate": "loss=mse, workers=None",
    "gradcheck": (
        "cotangent=None, method='auto', step=None, tolerance=None, allow_zero=(), every_entry_below=1000, "
        "directions=8, seed=0"
    ),
    "load_adapter": "dtype=None, backend=None",
    "loraplus": "ratio=16.0",
    "loftq": "target_modules='all-linear', rounds=1, block_size=64, double_quant=True",
    "merge": "requantize=False",
    "merge_adapter": "layouts=None, dry_run=False, progress=False",
    "quantize": "target_modules='all-linear', block_size=64, double_quant=True",
    "quantize_nf4": "block_size=64",
    "save_adapter": "fan_in_fan_out=False, base_model=None",
    "taylor_orders": "cotangent=None, halvings=12, seed=0",
    "train": (
        "epochs=100, batch_size=128, lr=0.001, log_every=10, progress=False, checkpoint=None, loss=mse, "
        "gradients=backpropagate, steps=None, held_out=None, report=None"
    ),
    "article.run": (
        "rank=1, alpha=1.0, epochs=100, batch_size=128, lr=0.001, seed=0, dtype='float32', backend=None, "
        "n=10000, in_features=1001, out_features=1000, progress=False, checkpoint=None"
    ),
    "chat.encode_chat": "tools=None",
    "chat.write_chat": "tools=None",
    "conformance.report.Report": (
        "claims=dict(), habits=dict(), diagnoses=list(), errors=dict(), kinds=dict(), functions=dict(), cases=list()"
    ),
    "conformance.report.Report.text": "known=()",
    "conformance.report.id_of": "number=None",
    "conformance.suite.check": "dtype=None, name=None",
    "conformance.suite.outcomes_of": "owed=(), watch=None",
    "conformance.xfails.Judged": "known=dict(), required=()",
    "conformance.xfails.github_error": "title='minilora conformance'",
    "data.Data": "example=''",
    "data.encode_example": "template=None",
    "data.load_data": "tokenizer=None",
    "fast.accumulation.Accumulated.evaluate": "loss=mse",
    "fast.accumulation.accumulate": "workers=1",
    "fast.residual.residual_form": "loss=mse",
    "files.chattemplate.ChatTemplate": "tokens=None",
    "files.chattemplate.ChatTemplate.render": "add_generation_prompt=False, tools=None",
    "files.checkpoint.Checkpoint": "settings=None, notes=None, name=''",
    "files.checkpoint.read": "name=''",
    "files.ggufblocks.BlockLinear": "bias=None, dtype='float32'",
    "layers.nf4.code_book": "levels=16",
    "layer.walk": "path=''",
    "layer.rebuild": "array=<lambda>, layer=<lambda>",
    "layer.parameter_count": "trained=False",
    "models.generate.generate": "temperature=0.0, top_p=1.0, rng=None, end=()",
    "models.memory.training_memory": (
        "rank=None, targets=('q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj'), "
        "bits=16, recompute=False"
    ),
    "models.generate.choose": "top_p=1.0",
    "text.token_ids": "size=None",
    "training.TrainingState": "history=History(), epoch=0",
    "training.backpropagate": "loss=mse",
    "training.draw_batches": "steps=None",
    "variants.pissa.pissa": "use_rslora=False",
    "verify.selfcheck.prove": "backend=None, seed=0",
}
COMMANDS = {
    "article": (
        "--rank=1 --alpha=1.0 --epochs=100 --batch-size=128 --lr=0.001 --seed=0 --dtype=float32 "
        "--backend=numpy --plot=None --save=None --checkpoint=None"
    ),
    "finetune": (
        "--model=None --target-modules=all-linear --rank=8 --alpha=16.0 --steps=None --batch-size=None "
        "--micro-batch=None --workers=None --length=128 --lr=None --seed=0 --dtype=float32 --quantize=None "
        "--backend=numpy --checkpoint=None --plot=None"
    ),
    "generate": (
        "--model=None --adapter=None --chat=False --tokens=100 --temperature=0.7 --top-p=1.0 --seed=0 "
        "--quantize=None --backend=numpy"
    ),
    "check": "--seed=0 --backend=numpy",
    "merge": "--layout=None --dry-run=False",
    "inspect": "--plot=None",
    "export": "",
    "conformance": "--dtype=None --xfails=None --require=None --timeout=20.0 --json=None",
    "vectors": "--compare=None --json=None",
    "golden": "--compare=None --json=None",
}


def shown(value):
    """Return a default as it is written; of a function or a class its name."""
    return value.__name__ if inspect.isfunction(value) or inspect.isclass(value) else repr(value)


def defaults_of(call):
    """Return the defaults of a signature, but for `need_dx`, which has a test of its own."""
    factories = {}
    if dataclasses.is_dataclass(call):
        made = (field for field in dataclasses.fields(call) if field.default_factory is not dataclasses.MISSING)
        factories = {field.name: f"{field.default_factory.__name__}()" for field in made}
    parameters = inspect.signature(call).parameters.values()
    given = {p.name: factories.get(p.name) or shown(p.default) for p in parameters if p.default is not p.empty}
    return ", ".join(f"{name}={value}" for name, value in given.items() if name != "need_dx")


def public_calls():
    """Yield every public function, class and method, by name."""
    names = {name: getattr(minilora, name) for name in minilora.__all__ if callable(getattr(minilora, name))}
    for module in MORE:
        for name, value in vars(import_module(f"minilora.{module}")).items():
            own = getattr(value, "__module__", None) == f"minilora.{module}" and value not in names.values()
            if own and not name.startswith(("_", "check_")) and callable(value) and not hasattr(value, "__origin__"):
                names[f"{module}.{name}"] = value
    for name, value in names.items():
        if not (inspect.isclass(value) and issubclass(value, Exception) and "__init__" not in vars(value)):
            yield name, value  # an exception that has no __init__ has no signature either
        for key, method in vars(value).items() if inspect.isclass(value) else ():
            if isinstance(method, (classmethod, staticmethod)):
                method = method.__func__
            if inspect.isfunction(method) and not key.startswith("_"):
                yield f"{name}.{key}", method


def test_every_default_in_python_is_the_tables():
    found = {name: defaults_of(call) for name, call in public_calls()}
    assert {name: defaults for name, defaults in found.items() if defaults} == PYTHON


def test_every_backward_returns_dx_by_default():
    backwards = {name: method for name, method in public_calls() if name.endswith(".backward")}
    assert len(backwards) >= 13
    for name, method in backwards.items():
        assert inspect.signature(method).parameters["need_dx"].default is True, name


def test_every_default_of_a_command_is_the_tables(monkeypatch):
    monkeypatch.delenv("MINILORA_BACKEND", raising=False)
    commands = next(action for action in _parser()._actions if isinstance(action, argparse._SubParsersAction)).choices
    found = {}
    for name, parser in commands.items():
        options = [a for a in parser._actions if a.option_strings and not a.required and a.dest != "help"]
        found[name] = " ".join(f"{option.option_strings[-1]}={option.default}" for option in options)
    assert found == COMMANDS
