"""The situations of `test_reports`: a folder of inputs for the five commands, and a command line for each situation."""

import json

import numpy as np
from safetensors.numpy import load_file, save_file

from minilora import adapt, adapters, save_adapter

from ..audit.adapters import config, factors, model, paths, peft
from ..support.language import tiny_llama, write_folder

LORA = """
import numpy as np


class right:
    @staticmethod
    def forward(x, weight, bias, lora_A, lora_B, alpha):
        y = x @ weight.T + alpha / len(lora_A) * x @ lora_A.T @ lora_B.T
        return y if bias is None else y + bias

    @staticmethod
    def backward(dy, x, weight, bias, lora_A, lora_B, alpha):
        s = alpha / len(lora_A)
        rows = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
        return {
            "x": dy @ weight + s * dy @ lora_B @ lora_A,
            "lora_A": s * (rows[0] @ lora_B).T @ rows[1],
            "lora_B": s * rows[0].T @ (rows[1] @ lora_A.T),
        }

    @staticmethod
    def merge(weight, lora_A, lora_B, alpha):
        return weight + alpha / len(lora_A) * lora_B @ lora_A


def but(**functions):
    return type("LoRA", (right,), {name: staticmethod(function) for name, function in functions.items()})


def alone(forward):
    return type("LoRA", (), {"forward": staticmethod(forward)})


def two_wrong_gradients(dy, x, *layer):
    grads, s = right.backward(dy, x, *layer), layer[-1] / len(layer[2])
    return {"x": grads["x"] - dy @ layer[0], "lora_A": grads["lora_A"], "lora_B": grads["lora_B"] / s}


def with_relu(x, weight, bias, lora_A, lora_B, alpha):
    h = np.maximum(x @ lora_A.T, 0)
    return right.forward(x, weight, bias, lora_A, lora_B, 0) + alpha / len(lora_A) * h @ lora_B.T


def for_two_rows(dy, x, *layer):
    if len(x) == 1:
        raise RuntimeError("one row is too few")
    return right.backward(dy, x, *layer)


def boom(*arrays):
    raise RuntimeError("boom\\x1b[31m")


def in_place(weight, lora_A, lora_B, alpha):
    weight += alpha / len(lora_A) * lora_B @ lora_A
    return weight


forward_alone = alone(right.forward)
not_divided = but(forward=lambda x, W, b, A, B, alpha: right.forward(x, W, b, A, B, alpha * len(A)))
two_bugs = but(backward=two_wrong_gradients)
rectified = but(forward=with_relu)
another_scaling = alone(lambda x, W, b, A, B, alpha: right.forward(x, W, b, A, B, alpha * len(A) / (1 + len(A))))
at_rank_1 = alone(lambda x, W, b, A, B, alpha: right.forward(x, W, b, A, B, alpha) + (len(A) == 1))
no_gradient_of_b = but(backward=lambda *a: {k: g for k, g in right.backward(*a).items() if k != "lora_B"})
backward_raises = but(backward=for_two_rows)
raises = alone(boom)
writes_into_x = but(merge=in_place)
of_two_kinds = but()
of_two_kinds.kinds = {"rslora": forward_alone}  # alpha / r in place of its root
in_single = alone(lambda *arrays: right.forward(*(a.astype("f4") if isinstance(a, np.ndarray) else a for a in arrays)))
"""
AT_RANK_1 = "linear-6-forward"
KNOWN = {
    "known.txt": f"{AT_RANK_1}  rank 1: our issue 12\n",
    "stale.txt": f"{AT_RANK_1}  rank 1\nlinear-5-forward  gone\nlinear-0-merge  not offered\nlinear-99-forward  none\n",
    "odd.txt": f"{AT_RANK_1}\n",
    "float32.txt": "".join(f"float32/linear-{n}-slope  our issue 3\n" for n in (0, 1)),
    "golden.txt": "rslora  our issue 4\ndora  our issue 5\n",
    "golden-stale.txt": "rslora  our issue 4\ndora  our issue 5\nbase-alone  gone\n",
}
SITUATIONS = {
    "conformance-right": ["conformance", "my_lora.py:right"],
    "conformance-right-all": ["conformance", "my_lora.py:right", "--all"],
    "conformance-forward-alone": ["conformance", "my_lora.py:forward_alone"],
    "conformance-named": ["conformance", "my_lora.py:not_divided"],
    "conformance-two-bugs": ["conformance", "my_lora.py:two_bugs"],
    "conformance-two-bugs-all": ["conformance", "my_lora.py:two_bugs", "--all"],
    "conformance-unknown": ["conformance", "my_lora.py:rectified"],
    "conformance-another-scaling": ["conformance", "my_lora.py:another_scaling"],
    "conformance-at-rank-1": ["conformance", "my_lora.py:at_rank_1"],
    "conformance-no-gradient-of-b": ["conformance", "my_lora.py:no_gradient_of_b"],
    "conformance-backward-raises": ["conformance", "my_lora.py:backward_raises"],
    "conformance-writes-into-weight": ["conformance", "my_lora.py:writes_into_x"],
    "conformance-of-two-kinds": ["conformance", "my_lora.py:of_two_kinds"],
    "conformance-in-single": ["conformance", "my_lora.py:in_single"],
    "conformance-known": ["conformance", "my_lora.py:at_rank_1", "--xfails", "known.txt"],
    "conformance-stale": ["conformance", "my_lora.py:at_rank_1", "--xfails", "stale.txt"],
    "conformance-not-known": ["conformance", "my_lora.py:not_divided", "--xfails", "known.txt"],
    "conformance-required": ["conformance", "my_lora.py:forward_alone", "--require", "forward,slope,output-dtype"],
    "conformance-cannot": ["conformance", "my_lora.py:raises"],
    "conformance-odd-xfails": ["conformance", "my_lora.py:raises", "--xfails", "odd.txt"],
    "vectors-right": ["vectors", "vectors", "--compare", "right"],
    "vectors-named": ["vectors", "vectors", "--compare", "named"],
    "vectors-one-precision": ["vectors", "vectors", "--compare", "one"],
    "vectors-known": ["vectors", "vectors", "--compare", "one", "--xfails", "float32.txt"],
    "golden-right": ["golden", "golden", "--compare", "golden-right"],
    "golden-right-all": ["golden", "golden", "--compare", "golden-right", "--all"],
    "golden-named": ["golden", "golden", "--compare", "golden-named"],
    "golden-unknown": ["golden", "golden", "--compare", "golden-unknown"],
    "golden-base": ["golden", "golden", "--compare", "golden-base"],
    "golden-missing": ["golden", "golden", "--compare", "golden-missing"],
    "golden-refused": ["golden", "golden", "--compare", "golden-refused"],
    "golden-sessions": ["golden", "golden", "--compare", "golden-sessions"],
    "golden-known": ["golden", "golden", "--compare", "golden-named", "--xfails", "golden.txt"],
    "golden-stale": ["golden", "golden", "--compare", "golden-named", "--xfails", "golden-stale.txt"],
    "audit-sound": ["audit", "sound", "--model", "model"],
    "audit-sound-all": ["audit", "sound", "--model", "model", "--all"],
    "audit-sound-merge": ["audit", "sound", "--model", "model", "--merge"],
    "audit-no-model": ["audit", "sound"],
    "audit-suspicious": ["audit", "untrained", "--model", "model"],
    "audit-wrong": ["audit", "not-a-target", "--model", "model"],
    "diagnose-right": ["diagnose", "right.safetensors", "--model", "llama", "--adapter", "adapter"],
    "diagnose-named": ["diagnose", "alpha.safetensors", "--model", "llama", "--adapter", "adapter"],
    "diagnose-unknown": ["diagnose", "noise.safetensors", "--model", "llama", "--adapter", "adapter"],
    "diagnose-strength": ["diagnose", "strength.safetensors", "--model", "llama", "--adapter", "adapter"],
    "diagnose-base": ["diagnose", "base.safetensors", "--model", "llama", "--adapter", "adapter"],
    "diagnose-base-right": ["diagnose", "base-right.safetensors", "--model", "llama", "--adapter", "adapter"],
    "diagnose-all": ["diagnose", "alpha.safetensors", "--model", "llama", "--adapter", "adapter", "--all"],
    "diagnose-undecided": ["diagnose", "weak.safetensors", "--model", "llama", "--adapter", "weak"],
    "diagnose-cannot": ["diagnose", "nothing.safetensors", "--model", "llama", "--adapter", "adapter"],
}
ON_GITHUB = ("conformance-two-bugs", "conformance-known", "conformance-stale", "conformance-cannot", "golden-named",
             "golden-stale", "audit-wrong", "diagnose-named", "vectors-one-precision")  # fmt: skip
SITUATIONS |= {f"{name}-github": SITUATIONS[name] for name in ON_GITHUB}
"""The command lines by situation; those in a GitHub Actions workflow, which gets error annotations, are last."""
FOR_PROGRAMS = ("conformance-right", "conformance-two-bugs", "conformance-stale", "conformance-required",
                "vectors-one-precision", "golden-named", "golden-missing", "golden-stale", "golden-sessions",
                "audit-sound-merge", "audit-wrong", "diagnose-named", "diagnose-unknown",
                "diagnose-undecided")  # fmt: skip
"""The situations whose whole JSON is compared too."""


def build(folder):
    """Write the inputs of all situations."""
    (folder / "my_lora.py").write_text(LORA, encoding="utf-8")
    for name, text in KNOWN.items():
        (folder / name).write_text(text, encoding="utf-8")
    _vectors(folder)
    _golden(folder / "golden")
    _adapters(folder)
    _logits(folder)


def _vectors(folder):
    """Write three vectors of a linear layer in two precisions, with answers to them."""
    from minilora.conformance import vectors

    vectors.write(folder / "vectors", vectors.STARTER)
    names = [f"linear-{n}-{dtype}.safetensors" for n in range(3) for dtype in ("float64", "float32")]
    for results in ("right", "named", "one"):
        (folder / results).mkdir()
        for name in names:
            arrays = load_file(folder / "vectors" / name)
            answers = {key: arrays[key] for key in ("y", "dA", "dB", "merged")}
            if results == "named":
                s = arrays["alpha"] / len(arrays["lora_A"])
                answers["y"] = answers["y"] + (s * len(arrays["lora_A"]) - s) * (
                    arrays["x"].astype("f8") @ arrays["lora_A"].T.astype("f8") @ arrays["lora_B"].T
                )
            if results == "one" and "float32" in name and "-2-" not in name:
                answers["dB"] = answers["dB"] + 1
            save_file({key: array.astype(arrays["x"].dtype) for key, array in answers.items()}, folder / results / name)


def _golden(folder):
    """Write a folder of golden adapters with a few cases and one session, and the answers of programs."""
    rng = np.random.default_rng(0)
    shape, tolerance = (1, 4, 5), {"float64": 1e-6, "float32": 1e-4, "float16": 1e-2, "bfloat16": 1e-1}
    flags = {
        "root-is-ignored": {"bug": "rsLoRA's root is ignored", "made in": ["https://github.com/me/mine/issues/7"]},
        "norm-is-that-of-w": {"bug": "the norm is that of W, without the update", "made in": []},
        "adapter-stays-on": {"bug": "the previous adapter stays on", "made in": []},
        "earlier-requests-leave-rounding": {"bug": "an earlier request has rounded the weights", "made in": []},
    }
    shown = {
        "base-alone": [],
        "all-linear": [],
        "rslora": ["root-is-ignored"],
        "dora": ["norm-is-that-of-w", "root-is-ignored"],
        **{f"case-{n}": [] for n in range(8)},
    }
    cases = [{"id": id, "adapter": [] if id == "base-alone" else f"adapters/{id}", "refused": False, "note": "",
              "answers": f"answers/{id}.safetensors", "flags": of} for id, of in shown.items()]  # fmt: skip
    cases.append({"id": "alpha-missing", "adapter": "a", "refused": True, "note": "nothing says the scaling"})
    requests = [
        {"answers": f"answers/swap.{n}.safetensors", "flags": ["adapter-stays-on"] if n else []} for n in range(3)
    ]
    sessions = [{"id": id, "requests": requests} for id in ("swap", "unload")]
    index = {"format": 1, "flags": flags, "tolerance": tolerance, "cases": cases, "sessions": sessions}
    (folder / "answers").mkdir(parents=True)
    (folder / "index.json").write_text(json.dumps(index))
    right, wrong = {}, {}
    for case in [*cases[:-1], *(r | {"id": f"swap.{n}"} for n, r in enumerate(requests))]:
        session = case["id"].startswith("swap")
        right[case["id"]] = logits = rng.standard_normal(shape[::2] if session else shape)
        signatures = {flag: rng.standard_normal(shape[::2]) for flag in case["flags"]}
        wrong[case["id"]] = {flag: _with_last(logits, last) for flag, last in signatures.items()}
        save_file({"logits": logits, **{f"signature.{flag}": last for flag, last in signatures.items()}},
                  folder / case["answers"])  # fmt: skip
    programs = {
        "golden-right": right,
        "golden-named": right | {id: wrong[id]["root-is-ignored"] for id in ("rslora", "dora")},
        "golden-unknown": right | {"all-linear": right["all-linear"] + 1},
        "golden-base": right | {"base-alone": right["base-alone"] + 1, "rslora": wrong["rslora"]["root-is-ignored"]},
        "golden-missing": {id: right[id] for id in ("base-alone", "case-0")},
        "golden-refused": right | {"alpha-missing": right["case-0"]},
        "golden-sessions": right | {"swap.1": wrong["swap.1"]["adapter-stays-on"], "swap.2": right["swap.2"] + 1e-2},
    }
    for name, answers in programs.items():
        (folder.parent / name).mkdir()
        for id, logits in answers.items():
            if name == "golden-sessions" or not id.startswith("swap"):
                save_file({"logits": logits.astype("f8")}, folder.parent / name / f"{id}.safetensors")


def _with_last(logits, last):
    """Return logits with the last position replaced."""
    if logits.ndim == 2:
        return last
    return np.concatenate([logits[:, :-1], last[:, None]], axis=1)


def _adapters(folder):
    model(folder / "model")
    tensors = factors(paths("q_proj", "v_proj"))
    peft(folder / "sound", tensors, config("q_proj", "v_proj", use_rslora=True))
    zero = {name: 0 * array if "lora_B" in name else array for name, array in tensors.items()}
    peft(folder / "untrained", zero, config("q_proj", "v_proj"))
    peft(folder / "not-a-target", tensors, config("q_proj", lora_alpha=1e6))


def _logits(folder):
    base, ids = tiny_llama(), np.random.default_rng(0).integers(0, 29, (2, 5))
    write_folder(folder / "llama", base)
    for name, size in (("weak", 1e-9), ("adapter", 0.25)):
        adapted = adapt(base, ["q_proj", "up_proj"], rank=2, alpha=5, rng=np.random.default_rng(0))
        for array in adapted.trainable().values():
            array += size * np.random.default_rng(1).standard_normal(array.shape)
        save_adapter(folder / name, adapters(adapted))
        logits = {name: adapted(ids)}
        if name == "adapter":
            right = adapted(ids)
            logits = {"right": right, "noise": right + np.random.default_rng(2).standard_normal(right.shape)}
            for file, times in (("alpha", 2.0), ("strength", 1.37)):
                for part in adapted.trainable():
                    if part.endswith("lora_B"):
                        adapted.trainable()[part] *= times
                logits[file] = adapted(ids)
                for part in adapted.trainable():
                    if part.endswith("lora_B"):
                        adapted.trainable()[part] /= times
        for file, array in logits.items():
            save_file({"prompts": ids, "logits": array}, folder / f"{file}.safetensors")
    for file, z in (("base", base(ids) / 0.7), ("base-right", base(ids))):
        tensors = {"prompts": ids, "logits": base(ids) / 0.7 if file == "base" else logits["alpha"], "base_logits": z}
        save_file(tensors, folder / f"{file}.safetensors")
