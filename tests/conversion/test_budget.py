import itertools

import numpy as np
import pytest
import timm
import torch

import perf_vit
from perf_vit.conversion import attention_errors, token_cosines
from perf_vit.conversion import budget as layer_options
from perf_vit.conversion.budget import choose_under_budget
from perf_vit.conversion.linearize import converted_layers

SIZE = 112
CANDIDATES = tuple(
    {"window_size": w, "num_sinks": s, "num_clusters": m} for w, s, m in ((2, 2, 2), (2, 8, 8), (4, 16, 24))
)


def build(name: str = "vit_tiny_patch16_224", **kwargs) -> torch.nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, **{"img_size": SIZE, "num_classes": 5, "depth": 4, **kwargs}).eval()
    # Weights from nothing give attention that is all mean; larger ones give it something to lose.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter *= 3
    return model


def images(count: int = 3, size: int = SIZE) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, size, size, generator=generator) for _ in range(count)]


@torch.no_grad()
def test_errors_are_those_of_each_layer_on_the_softmax_models_inputs() -> None:
    model = build()
    options = {"max_exact_tokens": 0, "window_size": 2, "num_sinks": 2, "num_clusters": 4}
    converted = perf_vit.linearize(model, per_layer={2: {"window_size": 9}}, **options)
    layers = converted_layers(converted)
    errors = attention_errors(model, {index: [layer] for index, layer in layers.items()}, images())
    inputs, outputs = [], []
    hook = model.blocks[3].attn.register_forward_hook(lambda _, x, y: inputs.append(x[0]) or outputs.append(y))
    model(torch.stack(images()))
    hook.remove()
    converted.patch_embed(images()[0][None])
    got = torch.cat([converted.blocks[3].attn(x) for x in inputs])
    expected = (got - outputs[0]).norm() / outputs[0].norm()
    assert errors[3][0] == pytest.approx(expected.item(), rel=1e-4)
    assert errors[2][0] < 1e-5 < errors[1][0]
    # Nothing stays on the softmax model.
    assert not any(module._forward_hooks for module in model.modules())


@torch.no_grad()
def test_cosines_of_final_tokens() -> None:
    model = build()
    patches, class_tokens = token_cosines(
        model, perf_vit.linearize(model, window_size=20, max_exact_tokens=0), images()
    )
    assert patches == pytest.approx([1.0] * 3, abs=1e-4)
    assert class_tokens == pytest.approx([1.0] * 3, abs=1e-4)
    without = build("vit_base_patch16_siglip_224", depth=2, embed_dim=96, num_heads=3)
    assert token_cosines(without, perf_vit.linearize(without, window_size=20, max_exact_tokens=0), images())[1] == []


@pytest.mark.parametrize("seed", range(5))
def test_the_choice_under_a_budget_is_the_best_of_all(seed: int) -> None:
    rng = np.random.default_rng(seed)
    errors, costs = rng.uniform(size=(4, 5)), rng.integers(1, 10, 5).astype(float)
    budget = 4.0 * costs.min() + rng.integers(0, 20)
    places = choose_under_budget(errors.tolist(), costs.tolist(), budget)
    assert places is not None
    assert sum(costs[place] for place in places) <= budget
    feasible = [x for x in itertools.product(range(5), repeat=4) if sum(costs[place] for place in x) <= budget * 0.995]
    best = min(sum(errors[layer, place] for layer, place in enumerate(x)) for x in feasible)
    assert sum(errors[layer, place] for layer, place in enumerate(places)) <= best + 1e-12


def test_a_budget_that_nothing_fits_has_no_choice() -> None:
    assert choose_under_budget([[1.0, 0.5]] * 3, [1.0, 2.0], 2.9) is None
    assert choose_under_budget([[1.0, 0.5]] * 3, [1.0, 2.0], -1.0) is None
    assert choose_under_budget([[1.0, 0.5]] * 3, [1.0, 2.0], 6.1) == [1, 1, 1]


def test_a_larger_budget_buys_smaller_errors(monkeypatch) -> None:
    model = build()
    # Times by the wall would make this test a matter of luck: candidates cost 1, 2 and 3, all else 10.
    monkeypatch.setattr(layer_options, "_measure_seconds", lambda *_: ([1.0, 2.0, 3.0], 14.0, 10.0))
    monkeypatch.setattr(layer_options, "_measure_relative_time", lambda *_: 0.0)
    steps = []
    choices = [
        perf_vit.conversion.choose_layer_options(
            model, images(2), budget, candidates=CANDIDATES, on_step=lambda done, total: steps.append((done, total))
        )
        for budget in (14.1 / 14, 18.1 / 14, 22.1 / 14)
    ]
    assert list(choices[0].values()) == [CANDIDATES[0]] * 4
    assert list(choices[2].values()) == [CANDIDATES[2]] * 4
    total = []
    for per_layer in choices:
        converted = perf_vit.linearize(model, per_layer=per_layer, max_exact_tokens=0)
        errors = attention_errors(model, {i: [x] for i, x in converted_layers(converted).items()}, images(2))
        total.append(sum(error for (error,) in errors.values()))
    assert total[0] > total[1] > total[2]
    with pytest.raises(ValueError, match=r"at least what the fastest candidates take, about 1\.00 times .*, got 0\.9"):
        perf_vit.conversion.choose_layer_options(model, images(1), 0.9, candidates=CANDIDATES)


def test_a_choice_that_takes_longer_than_predicted_is_made_again(monkeypatch) -> None:
    model = build()
    monkeypatch.setattr(layer_options, "_measure_seconds", lambda *_: ([1.0, 2.0, 3.0], 14.0, 10.0))
    measured = []

    def relative_time(converted, *_) -> float:
        # Each candidate takes half as much again as alone.
        seconds = {CANDIDATES[place]["num_clusters"]: place + 1.0 for place in range(3)}
        own = [seconds[layer.options.num_clusters] for layer in converted_layers(converted).values()]
        measured.append((10 + 1.5 * sum(own)) / 14)
        return measured[-1]

    monkeypatch.setattr(layer_options, "_measure_relative_time", relative_time)
    budget = 22.1 / 14
    chosen = perf_vit.conversion.choose_layer_options(model, images(1), budget, candidates=CANDIDATES)
    assert measured[0] == pytest.approx(28 / 14)
    assert len(measured) > 1
    assert measured[-1] <= budget * 1.02 < measured[-2]
    assert len(chosen) == 4
    with pytest.raises(ValueError, match=r"at most 1\.01 times .* when measured, .* should take 1\.00; try 1\.2"):
        perf_vit.conversion.choose_layer_options(model, images(1), 1.01, candidates=CANDIDATES)


def test_times_are_measured_and_layers_can_be_chosen() -> None:
    seen = []
    chosen = perf_vit.conversion.choose_layer_options(
        build(),
        images(1),
        1000.0,
        layers=[1, 3],
        candidates=CANDIDATES,
        on_step=lambda done, total: seen.append((done, total)),
    )
    assert chosen == {1: CANDIDATES[2], 3: CANDIDATES[2]}
    assert seen[-1][0] == seen[-1][1]
    assert [done for done, _ in seen] == list(range(1, len(seen) + 1))


def test_wrong_arguments_of_the_choice_are_named() -> None:
    with pytest.raises(ValueError, match="expected images and candidates to choose by, got 0 and 24"):
        perf_vit.conversion.choose_layer_options(build(), [])
    with pytest.raises(ValueError, match="did you mean 'num_sinks'"):
        perf_vit.conversion.choose_layer_options(build(), images(1), candidates=[{"num_sink": 3}])
    with pytest.raises(ValueError, match="layers must name one layer or more"):
        perf_vit.conversion.choose_layer_options(build(), images(1), layers=[])
    with pytest.raises(ValueError, match=r"num_sinks must not be both an option of all layers \(7\) and one to choose"):
        perf_vit.conversion.choose_layer_options(build(), images(1), candidates=CANDIDATES, num_sinks=7)
    exact = [{"num_clusters": 8, "max_exact_tokens": 64}]
    with pytest.raises(ValueError, match=r"every size, got max_exact_tokens=64; give it to linearize"):
        perf_vit.conversion.choose_layer_options(build(), images(1), candidates=exact)


def test_options_that_do_not_fit_are_refused_before_anything_is_measured() -> None:
    steps = []
    with pytest.raises(ValueError, match="num_features is an option of mixer='performer'"):
        perf_vit.conversion.choose_layer_options(
            build(),
            images(1),
            num_features=32,
            on_step=lambda *step: steps.append(step),
        )
    assert not steps


def test_what_is_fixed_is_not_chosen(monkeypatch) -> None:
    monkeypatch.setattr(layer_options, "_measure_seconds", lambda *_: ([1.0] * 3, 14.0, 10.0))
    monkeypatch.setattr(layer_options, "_measure_relative_time", lambda *_: 0.0)
    few = tuple(
        {"window_size": w, "num_sinks": s, "num_clusters": 4} for w, s in ((2, 2), (2, 4), (3, 2), (3, 4), (4, 2))
    )
    monkeypatch.setattr(layer_options, "CANDIDATES", few)
    wrapped = torch.nn.Sequential(build(depth=2))
    chosen = perf_vit.conversion.choose_layer_options(wrapped, images(1), 2.0, num_sinks=7)
    assert [each["num_sinks"] for each in chosen.values()] == [7, 7]
    converted = perf_vit.linearize(wrapped, per_layer=chosen, num_sinks=7)
    assert {layer.options.num_sinks for layer in converted_layers(converted).values()} == {7}


def test_the_crossover_is_the_largest_grid_before_clusters_are_faster(monkeypatch) -> None:
    seen = []

    def seconds(call, device) -> float:
        q, is_softmax = call.args[0], call.func is layer_options.softmax_attention
        seen.append((q.shape, q.dtype, is_softmax))
        call()
        num_tokens = q.shape[2] - 1
        # Equal at 18 x 18 tokens.
        return num_tokens**2 if is_softmax else 18**2 * num_tokens

    monkeypatch.setattr(layer_options, "_clock", seconds)
    model = build().double()
    assert perf_vit.conversion.measure_crossover(model, window_size=4, num_sinks=2, num_clusters=3) == 16 * 16
    assert {shape for shape, _, _ in seen} == {(1, 3, 1 + side * side, 64) for side in (16, 20)}
    assert {dtype for _, dtype, _ in seen} == {torch.float64}
    assert {is_softmax for _, _, is_softmax in seen} == {False, True}
    monkeypatch.setattr(layer_options, "_clock", lambda call, _: call.func is layer_options.softmax_attention)
    assert perf_vit.conversion.measure_crossover(model) == 0
    with pytest.raises(ValueError, match="did you mean 'num_sinks'"):
        perf_vit.conversion.measure_crossover(model, num_sink=3)
