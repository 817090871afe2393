"""What a loss depends on is found in its graph, not in the values of gradients."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from modules.reached import reached, reached_by_any


class Adapted(nn.Module):
    """A frozen layer with an adapter as LoRA has it, whose second matrix is zero at first; and a layer not used."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.other = nn.Linear(3, 4).requires_grad_(False), nn.Linear(3, 4)
        self.a, self.b = nn.Parameter(torch.randn(2, 3)), nn.Parameter(torch.zeros(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.a.T @ self.b.T


def trained(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def test_a_gradient_of_zeros_is_one() -> None:
    module = Adapted()
    loss = module(torch.randn(5, 3)).square().sum()
    found = reached(loss, trained(module))
    loss.backward()
    assert not module.a.grad.any()
    assert found == {name for name, p in trained(module).items() if p.grad is not None} == {"a", "b"}


def test_a_checkpointed_pass_hides_nothing() -> None:
    module, x = Adapted(), torch.randn(5, 3, requires_grad=True)
    for reentrant in (False, True):
        found = reached(checkpoint(module, x, use_reentrant=reentrant).sum(), trained(module))
        assert found == (set() if reentrant else {"a", "b"})  # as the documentation of `reached` says


def test_frozen_shared_and_constant_parts() -> None:
    module = Adapted()
    assert reached(torch.zeros(()), trained(module)) == set()
    assert reached(module.base(torch.randn(3)).sum(), trained(module)) == set()
    twice = module.other(module.other(torch.randn(3))[:3]).sum()
    assert reached(twice, trained(module)) == {"other.weight", "other.bias"}
    assert reached(module.other(torch.randn(3)).detach().sum() + module.b.sum(), trained(module)) == {"b"}


def test_what_one_rank_needs_all_keep() -> None:
    class Two:
        """Of two ranks; the other one's loss depends on the second of three names."""

        def reduce(self, flags: Tensor, reduce_op: str) -> Tensor:
            assert reduce_op == "sum"
            return flags + torch.tensor([0.0, 1.0, 0.0])

    of = ["first", "second", "third"]
    for names in ({"third"}, {"second", "third"}):
        assert reached_by_any(names, of, Two(), torch.device("cpu")) == {"second", "third"}  # type: ignore[arg-type]
    assert reached_by_any(set(), of, Two(), torch.device("cpu")) == {"second"}  # type: ignore[arg-type]
