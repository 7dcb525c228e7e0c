import copy

import pytest
import timm
import torch
from torch.nn import functional as F

import perf_vit
from perf_vit.errors import ConfigError
from perf_vit.layers import LinearizedAttention
from perf_vit.tasks import DistillationOptimConfig, DistillationTask
from perf_vit.tasks.distillation import match_blocks, recorded_blocks, token_loss

# 8 x 8 patches, of which few are exact: the rest is what a student has to learn.
OPTIONS = {"mixer": "performer", "num_features": 32}
MODELS = {
    "vit": ("vit_tiny_patch16_224", {"patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2}),
    "registers": ("vit_small_patch14_reg4_dinov2", {"patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2}),
    "rope": ("eva02_tiny_patch14_224", {"patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2}),
}


def _teacher(kind: str) -> torch.nn.Module:
    name, kwargs = MODELS[kind]
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0, img_size=64, **kwargs).eval()
    # Sharp attention, as pretrained models have it; at random weights it is flat and any kernel fits it.
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith(("qkv.weight", "q_proj.weight", "k_proj.weight")):
                parameter.mul_(8)
            elif "ls1" in parameter_name or "ls2" in parameter_name:
                parameter.fill_(1)
    return model


def _images(seed: int, count: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 8, 8, generator=generator)
    return F.interpolate(coarse, size=64, mode="bilinear") + 0.2 * torch.randn(count, 3, 64, 64, generator=generator)


@pytest.mark.parametrize("kind", MODELS)
def test_a_block_called_again_gives_what_was_recorded(kind: str) -> None:
    teacher, image = _teacher(kind), _images(0)
    with torch.no_grad(), recorded_blocks(teacher) as calls:
        tokens = teacher.forward_features(image)
    assert len(calls) == 2
    with torch.no_grad():
        for block, call in zip(teacher.blocks, calls, strict=True):
            assert torch.equal(block(*call.arguments, **call.options), call.output)
        assert torch.equal(teacher.norm(calls[-1].output), tokens)
    assert not any(block._forward_hooks for block in teacher.blocks)


@pytest.mark.parametrize("kind", MODELS)
def test_gradients_block_by_block_are_those_of_the_sum(kind: str) -> None:
    teacher, image = _teacher(kind).requires_grad_(False), _images(0)
    student = perf_vit.linearize(teacher, **OPTIONS).requires_grad_(True)
    loss = match_blocks(teacher, student, image, lambda part: part.backward())
    got = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()
    # The same written out: teacher's tokens in, normalised squared error of the change.
    with torch.no_grad(), recorded_blocks(teacher) as calls:
        teacher.forward_features(image)
    losses = []
    for block, call in zip(student.blocks, calls, strict=True):
        x = call.arguments[0]
        wrong = block(x, *call.arguments[1:], **call.options) - call.output
        losses.append(wrong.square().sum() / (call.output - x).square().sum())
    sum(losses).backward()
    assert float(loss) == pytest.approx(sum(losses).item() / 2, rel=1e-5)
    assert float(loss) > 1e-3
    assert got
    assert all(name.startswith("blocks.") for name in got)
    for name, gradient in got.items():
        expected = student.get_parameter(name).grad
        assert torch.allclose(gradient, expected, rtol=1e-4, atol=1e-6), name


def test_a_softmax_block_is_not_matched() -> None:
    teacher, image = _teacher("vit"), _images(0)
    student = perf_vit.linearize(teacher, layers=[1], **OPTIONS)
    parts: list[torch.Tensor] = []
    total = match_blocks(teacher, student, image, parts.append)
    assert len(parts) == 1
    assert float(total) == pytest.approx(float(parts[0].detach()))


def test_token_loss_is_nothing_at_the_target_and_counts_prefix_and_patches_alike() -> None:
    target = torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(0))
    assert float(token_loss(3 * target, target, 1)) == pytest.approx(0, abs=1e-6)
    turned = target.clone()
    turned[:, 0] *= -1
    assert float(token_loss(turned, target, 1)) == pytest.approx(2, abs=1e-6)
    assert float(token_loss(-target, target, 0)) == pytest.approx(2, abs=1e-6)


@pytest.mark.parametrize(("trainable", "expected"), [("attention", {"attn", "norm1", "ls1"}), ("all", None)])
def test_only_what_is_asked_for_trains(trainable: str, expected: set[str] | None) -> None:
    teacher = _teacher("registers")
    task = DistillationTask(
        teacher, perf_vit.linearize(teacher, **OPTIONS), DistillationOptimConfig(trainable=trainable)
    )
    trained = {name for name, p in task.student.named_parameters() if p.requires_grad}
    if expected is None:
        assert trained == {name for name, _ in task.student.named_parameters()}
    else:
        assert {name.split(".")[2] for name in trained} == expected
    assert not any(p.requires_grad for p in task.teacher.parameters())


def test_eva_trains_its_scale_and_both_models_stay_in_evaluation_mode() -> None:
    teacher = _teacher("rope")
    task = DistillationTask(teacher, perf_vit.linearize(teacher, **OPTIONS), DistillationOptimConfig())
    task.train()
    assert task.training
    assert not any(module.training for model in (task.teacher, task.student) for module in model.modules())
    trained = {name.split(".")[2] for name, p in task.student.named_parameters() if p.requires_grad}
    assert {"attn", "norm1"} <= trained <= {"attn", "norm1", "gamma_1"}


@pytest.mark.parametrize(("stage", "lr"), [("block", 1e-3), ("token", 1e-4)])
@pytest.mark.parametrize("kind", MODELS)
def test_training_on_some_images_lowers_loss_and_raises_cosine_on_others(kind: str, stage: str, lr: float) -> None:
    teacher = _teacher(kind).requires_grad_(False)
    student = perf_vit.linearize(teacher, **OPTIONS)
    prefix = teacher.num_prefix_tokens
    DistillationTask(teacher, student, DistillationOptimConfig())

    def loss_of(image: torch.Tensor, backward=None) -> float:
        if stage == "block":
            return match_blocks(teacher, student, image, backward).item()
        loss = token_loss(student.forward_features(image), teacher.forward_features(image), prefix)
        if backward is not None:
            backward(loss)
        return loss.item()

    def held_out() -> tuple[float, float]:
        image = _images(99, 8)
        with torch.no_grad():
            tokens, target = (model.forward_features(image) for model in (student, teacher))
            return loss_of(image), float(F.cosine_similarity(tokens, target, dim=-1).mean())

    loss_before, cosine_before = held_out()
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=lr, weight_decay=0)
    for step in range(60):
        optimizer.zero_grad()
        loss_of(_images(step, 4), lambda part: part.backward())
        optimizer.step()
    loss_after, cosine_after = held_out()
    assert loss_after < 0.95 * loss_before
    assert 1 - cosine_after < 0.95 * (1 - cosine_before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trainable": "mlp"}, "optim.trainable must be one of attention, all"),
        ({"block_steps": 0}, "one of them above 0"),
        ({"token_steps": -1}, "0 or more"),
        ({"max_minutes": 0.0}, "above 0"),
        ({"max_minutes": float("nan")}, "above 0"),
        ({"block_lr": 0.0}, "optim.block_lr must be a number above 0, got 0"),
        ({"token_lr": -1e-5}, "optim.token_lr must be a number above 0, got -1e-05"),
        ({"gradient_clip": -1.0}, "optim.gradient_clip of at least 0 .* got -1 and 0.1"),
        ({"warmup_fraction": 1.0}, "optim.warmup_fraction from 0 to below 1, got 1 and 1"),
    ],
)
def test_a_config_that_makes_no_run_is_refused(changes: dict, message: str) -> None:
    teacher = _teacher("vit")
    with pytest.raises(ConfigError, match=message):
        DistillationTask(teacher, copy.deepcopy(teacher), DistillationOptimConfig(**changes))


def test_a_student_without_linear_attention_is_refused() -> None:
    teacher = _teacher("vit")
    with pytest.raises(ValueError, match="linearized attention"):
        DistillationTask(teacher, copy.deepcopy(teacher), DistillationOptimConfig())
    assert not any(isinstance(module, LinearizedAttention) for module in teacher.modules())
