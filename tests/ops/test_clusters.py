"""Clusters of keys and their statistics."""

import pytest
import torch

from perf_vit.ops.clusters import Sample, choose_clusters, describe_clusters, mean_key, sample_tokens
from perf_vit.ops.windows import WindowGrid, window_indices


def make(number: int, kinds: int = 30) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values of which keys and values come in kinds."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, number, 8, generator=generator, dtype=torch.float64)
    centers = 4 * torch.randn(2, 3, kinds, 8, generator=generator, dtype=torch.float64)
    of_kind = torch.randint(0, kinds, (number,), generator=generator)
    return q, centers[:, :, of_kind] + 0.3 * k, v + centers[:, :, of_kind].flip(-1)


def test_statistics_are_those_of_their_definition() -> None:
    q, k, v = make(400)
    k = k - mean_key(k, None)
    found = describe_clusters(Sample(q, k, v), 20)
    centers, norms = k[:, :, 10::20], k[:, :, 10::20].square().sum(-1, keepdim=True)
    for _ in range(2):
        nearest = (2 * k @ centers.mT - norms.mT).argmax(-1)
        member = torch.nn.functional.one_hot(nearest, 20).double()
        number = member.sum(2).unsqueeze(-1)
        mean = [torch.where(number > 0, member.mT @ x / number, x.mean(2, keepdim=True)) for x in (k, k.square())]
        centers, norms = mean[0], mean[1].sum(-1, keepdim=True)
    some, number = number > 0, number.clamp(min=1)
    torch.testing.assert_close(found.centers, centers, rtol=1e-5, atol=1e-4)
    r_k, r_v = (x - (member.mT @ x / number).take_along_dim(nearest.unsqueeze(-1), 2) for x in (k, v))
    spread = member.mT @ (r_k.square() * q.square().mean(2, keepdim=True)).sum(-1, keepdim=True) / number / 16
    torch.testing.assert_close(found.spread[some], spread[some], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found.groups.sum(-1), torch.ones(2, 3, 20, dtype=torch.float64))
    weight = member @ found.groups
    expected = torch.einsum("bhng,bhnd,bhne->bhgde", weight, r_k, r_v) / weight.sum(2)[..., None, None]
    torch.testing.assert_close(found.covariance, expected, rtol=1e-5, atol=1e-6)


def test_two_iterations_bring_centers_nearer_to_their_keys() -> None:
    q, k, v = make(3000)
    members = torch.nn.functional.one_hot(choose_clusters(q, k, v, 40), 40).double()
    means = members.mT @ k / members.sum(dim=2).clamp(min=1).unsqueeze(-1)
    spaced = k[:, :, :: 3000 // 40][:, :, :40]
    distance = torch.cdist(k, spaced).amin(-1).square().mean()
    assert (members @ means - k).square().sum(-1).mean() < 0.7 * distance


@pytest.mark.parametrize("length", [1, 300, 4095, 4096, 10_000, 65_536, 100_000])
def test_a_sample_spreads_over_all_columns(length: int) -> None:
    x = torch.arange(length, dtype=torch.float32).view(1, 1, length, 1)
    found = sample_tokens(x, x, x, None).k.flatten().long()
    assert min(length, 1000) <= len(found) <= 5461
    if length == 65_536:
        assert len((found % 256).unique()) == 256


@pytest.mark.parametrize("visible", [0, 1, 30, 5000])
def test_a_masked_sample_is_that_of_the_visible_tokens(visible: int) -> None:
    q, k, v = (x.float() for x in make(6000))
    mask = torch.zeros(2, 6000, dtype=torch.bool)
    mask[:, 500 : 500 + visible] = True
    q[:, :, :500] = torch.nan
    sample = sample_tokens(q, k, v, mask)
    assert not sample.k[:, :, ~sample.valid[0, 0, :, 0].bool()].any()
    found = describe_clusters(sample, 20)
    assert all(x.isfinite().all() for x in (found.centers, found.spread, found.groups, found.covariance))
    if visible >= 20:
        cropped = describe_clusters(sample_tokens(*(x[:, :, 500 : 500 + visible] for x in (q, k, v)), None), 20)
        for name in ("centers", "covariance", "spread"):
            torch.testing.assert_close(getattr(found, name), getattr(cropped, name), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("grid", [(1, 1), (5, 7), (16, 16), (37, 37), (3, 50)])
@pytest.mark.parametrize("window_size", [1, 4, 16])
def test_windows_hold_every_token_once_and_come_back_in_order(grid: tuple[int, int], window_size: int) -> None:
    windows = WindowGrid.of(grid, window_size)
    x = 1 + torch.arange(grid[0] * grid[1], dtype=torch.float32).view(1, 1, *grid, 1)
    split = windows.split(x)
    assert split.shape[3] == windows.height * windows.width <= window_size**2
    assert split[split > 0].sort().values.tolist() == x.flatten().tolist()
    assert torch.equal(windows.join(split, grid[0]), x.transpose(0, 1).view(1, *grid, 1, 1))
    of_token = window_indices(grid, window_size)
    for index, tokens in enumerate(split[0, 0, :, :, 0]):
        assert set(tokens[tokens > 0].long().tolist()) == set((torch.nonzero(of_token == index) + 1).flatten().tolist())
