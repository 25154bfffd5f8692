"""At the prompt: what a first user types wrongly gets one sentence that says what to do, and changes nothing."""

import warnings

import numpy as np
import pytest

import minilora
from minilora import Layer, Linear, LoRALinear, Sequential, Tanh, adapt, evaluate, mse, train
from minilora.layer import freeze
from minilora.training import LossGrew, TrainingDiverged

RNG = np.random.default_rng
X, Y = RNG(0).standard_normal((100, 5)), RNG(1).standard_normal((100, 3))


def layer():
    return Linear.init(5, 3, rng=RNG(2), dtype="float64")


@pytest.mark.parametrize(("rows", "size"), [(100, 100), (128, 128), (300, 128), (1, 1)])
def test_a_batch_has_128_rows_or_all_where_there_are_fewer(rows, size):
    x, y = RNG(3).standard_normal((rows, 5)), RNG(4).standard_normal((rows, 3))
    one, other = layer(), layer()
    train(one, x, y, epochs=3, rng=RNG(5))
    train(other, x, y, epochs=3, rng=RNG(5), batch_size=size)
    np.testing.assert_array_equal(one.weight, other.weight)


def test_with_few_rows_other_mistakes_are_told():
    model = layer()
    before = model.weight.copy()
    with pytest.raises((TypeError, ValueError), match="lr"):
        train(model, X, Y, rng=RNG(0), lr="1e-3")
    with pytest.raises(ValueError, match="at most the 100 rows of X, got 128"):
        train(model, X, Y, rng=RNG(0), batch_size=128)
    np.testing.assert_array_equal(model.weight, before)


def test_what_a_loss_a_forward_or_a_backward_returned_is_not_handed_on_whole():
    model = layer()
    y, cache = model.forward(X)
    for mistake in (
        lambda: model.backward(mse(y, Y), cache),
        lambda: model(model.forward(X)),
        lambda: mse(model.forward(X), Y),
        lambda: model.backward(model.backward(Y, cache), cache),
    ):
        with pytest.raises(TypeError, match=r"got tuple: take the one that is meant, of \(loss, grad"):
            mistake()
    with pytest.raises(TypeError, match=r"convert it with numpy.asarray\(x\)"):
        model([1.0, 2.0, 3.0, 4.0, 5.0])


@pytest.mark.parametrize(
    "model",
    [layer(), LoRALinear.from_linear(layer(), rank=2, alpha=2, rng=RNG(0)), Sequential(a=layer(), b=Tanh()), Tanh()],
    ids=lambda model: type(model).__name__,
)
def test_exchanged_arguments_of_backward_are_told(model):
    y, cache = model.forward(X)
    with pytest.raises(TypeError, match=r"^dy and cache are exchanged: call backward\(dy, cache\)$"):
        model.backward(cache, y)


def test_a_frozen_model_is_to_be_adapted_first():
    model, rng = freeze(layer()), RNG(0)
    state = rng.bit_generator.state
    with pytest.raises(ValueError, match=r"^model has nothing to train: all of it is frozen; put adapters .*adapt$"):
        train(model, X, Y, rng=rng)
    assert rng.bit_generator.state == state
    train(adapt(model, [""], rank=2, alpha=2, rng=rng), X, Y, epochs=1, rng=rng)


@pytest.mark.parametrize("use", [lambda model: model(X), lambda model: train(model, X, Y, rng=RNG(0))])
def test_a_transposed_weight_is_asked_for(use):
    with pytest.raises(
        ValueError, match=r"expected in_features = 3.*is the weight transposed\? It lies as \(out, in\)$"
    ):
        use(Linear(np.ascontiguousarray(layer().weight.T)))
    with pytest.raises(ValueError, match="expected in_features = 7") as refused:
        use(Linear(np.ones((3, 7))))
    assert "transposed" not in str(refused.value)


def test_a_loss_that_grew_a_thousandfold_is_told_at_the_end():
    with pytest.warns(LossGrew, match=r"^the loss grew from .*: lr = 1000.0 is too large") as warned:
        train(layer(), X, Y, rng=RNG(0), lr=1000.0, epochs=10)
    assert ["in the first epoch" in str(warning.message) for warning in warned] == [True, False]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(layer(), X, Y, rng=RNG(0), lr=1e-2)
        exact = layer()
        train(exact, X, exact(X), rng=RNG(0), lr=1e-3, epochs=5)  # from 0 upwards, which is nothing
    with pytest.raises(TrainingDiverged):
        train(layer(), X, Y, rng=RNG(0), lr=1e200)


@pytest.mark.parametrize(("times", "told"), [(9.9, []), (10.1, [True]), (999, [True]), (1001, [True, False])])
def test_a_loss_has_grown_tenfold_at_first_and_a_thousandfold_at_last(times, told):
    model, x = Linear(np.ones((1, 1))), np.ones((1, 1))  # whose loss is the square of its weight

    def upwards(model, x, y, loss):
        return {"weight": -np.ones((1, 1))}  # of which Adam's first step has the length lr

    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always", LossGrew)
        train(model, x, 0 * x, rng=RNG(0), epochs=1, lr=times**0.5 - 1, gradients=upwards)
    assert ["in the first epoch" in str(warning.message) for warning in warned] == told


def test_growth_is_that_of_the_loss_that_is_measured():
    far = X, 1e6 * Y  # where the loss begins a trillion times above that of X and Y
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(layer(), X, Y, rng=RNG(0), epochs=2, held_out=far)
    with pytest.warns(LossGrew):
        train(layer(), *far, rng=RNG(0), epochs=30, lr=1e3, held_out=(X, Y))


def test_a_loss_that_grew_before_a_training_went_on_is_told_as_well(tmp_path):
    """It is held against where the training began, and not against where it goes on."""
    options = {"lr": 1000.0, "checkpoint": tmp_path / "c", "batch_size": 8}
    with pytest.warns(LossGrew) as told:
        train(layer(), X, Y, rng=RNG(0), epochs=10, **options)
    with pytest.warns(LossGrew) as again:
        train(layer(), X, Y, rng=RNG(0), epochs=11, **options)
    start, resumed = (str(notes[0].message).split(" to ")[0] for notes in (told, again))
    assert start == resumed


def test_a_rank_that_gains_nothing_is_told_once_and_taken():
    model = Sequential(a=layer(), b=Tanh(), c=Linear.init(3, 4, rng=RNG(0)))
    with pytest.warns(
        UserWarning, match=r"^rank 4 is above the smaller width of 2 .* 'a': .* rank=3 says as much"
    ) as notes:
        adapted = adapt(model, ["a", "c"], rank=4, alpha=4, rng=RNG(0))
    assert len(notes) == 1
    assert {adapter.rank for adapter in minilora.adapters(adapted).values()} == {4}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapt(model, ["a", "c"], rank=3, alpha=4, rng=RNG(0))
        minilora.attach(model, minilora.adapters(adapted))  # as from a file


def test_complex_data_are_not_trained_on():
    for x, y in ((X + 0j, Y), (X, Y + 0j)):
        with pytest.raises(TypeError, match="complex128"):
            train(layer(), x, y, rng=RNG(0))


def test_the_tab_key_shows_public_names_and_modules_alone():
    names = dir(minilora)
    assert {"adapt", "files", "conformance", "exercises", "language", "layers"} <= set(names)
    assert not {"Any", "cache", "import_module", "lazy_attributes"} & set(names)
    assert all(hasattr(minilora, name) for name in ("files", "conformance", "exercises"))


def test_data_that_hold_nan_are_named_by_evaluate_too():
    x = X.copy()
    x[3, 4] = np.nan
    with pytest.raises(ValueError, match=r"^X holds .*entry \(3, 4\) is nan"):
        evaluate(layer(), x, Y)
    with pytest.raises(ValueError, match=r"^Y holds .*entry \(0, 1\) is inf"):
        evaluate(layer(), X, np.where(np.arange(300).reshape(100, 3) == 1, np.inf, Y))


def test_a_loss_that_grew_in_the_first_epoch_is_told_then():
    told = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(
            layer(), X, Y, epochs=3, lr=30.0, rng=RNG(0), report=lambda state: told.append((state.epoch, len(caught)))
        )
    assert told[0] == (1, 1)
    assert "in the first epoch: lr = 30.0 is too large; start again with a smaller one" in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(layer(), X, Y, epochs=3, lr=1e-3, rng=RNG(0))


def test_an_alpha_is_set_at_the_adapter_and_is_above_0():
    adapted = LoRALinear.from_linear(layer(), rank=2, alpha=4, rng=RNG(0))
    dora = adapt(Sequential(fc=layer()), ["fc"], rank=2, alpha=4, rng=RNG(0), use_dora=True).fc
    for each in (adapted, dora):
        with pytest.raises(AttributeError, match="alpha"):
            each.alpha = 8
        with pytest.raises(ValueError, match=r"^alpha must be above 0 and finite, got -3"):
            each.adapter.alpha = -3
        assert (each.alpha, each.scaling) == (4, 2)
        each.adapter.alpha = 8
        assert (each.alpha, each.scaling) == (8, 4)


def test_a_rank_that_gains_nothing_is_told_by_from_linear_too():
    with pytest.warns(UserWarning, match=r"^rank 4 is above the smaller width 3 of the layer: an update has at most"):
        LoRALinear.from_linear(layer(), rank=4, alpha=4, rng=RNG(0))


def test_what_cannot_be_adapted_is_told_what_to_do():
    with pytest.raises(
        ValueError, match=r"the model is one layer, without a name: LoRALinear\.from_linear\(layer, rank"
    ):
        adapt(layer(), ["fc1"], rank=1, alpha=1, rng=RNG(0))
    once = adapt(Sequential(fc=layer()), ["fc"], rank=1, alpha=1, rng=RNG(0))
    for targets in (["fc"], "all-linear"):
        with pytest.raises(ValueError, match=r"^every layer of the model has an adapter already: merge\(model\) folds"):
            adapt(once, targets, rank=1, alpha=1, rng=RNG(0))


def test_a_layer_of_ones_own_is_told_what_it_lacks():
    class Half(Layer):
        def forward(self, x):
            return x

    with pytest.raises(TypeError, match=r"^forward of Half returned ndarray, expected a tuple \(y, cache\)$"):
        Half()(X)
    with pytest.raises(TypeError, match=r"^forward of Half returned ndarray"):
        train(Half(), X, Y, rng=RNG(0))
    with pytest.raises(
        NotImplementedError, match=r"^Half has no backward\(dy, cache, \*, need_dx=True\) -> \(dx, grad"
    ):
        Half().backward(X, ())
    with pytest.raises(NotImplementedError, match=r"^Layer has no forward\(x\) -> \(y, cache\)$"):
        Layer().forward(X)
    with pytest.raises(TypeError, match=r"^Sequential takes its layers by name, as in Sequential\(fc1=Linear"):
        Sequential(layer(), Tanh())
