"""Random inputs of a layer, and the difference between two sets of gradients."""

import torch


def problem(grid, prefix, dtype=torch.float64, channels=(6, 4), batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    num_tokens = prefix + grid[0] * grid[1]

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    x = draw(batch, num_tokens, channels[0]).requires_grad_()
    weight, bias = draw(channels[1], channels[0]).requires_grad_(), draw(channels[1]).requires_grad_()
    return x, weight, bias, draw(batch, num_tokens, channels[1])


def relative(found, expected):
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def cosine(found, expected):
    assert found.keys() == expected.keys()
    dot = sum((found[n] * e).sum() for n, e in expected.items())
    return (dot / sum(f.square().sum() for f in found.values()) ** 0.5
            / sum(e.square().sum() for e in expected.values()) ** 0.5).item()  # fmt: skip
