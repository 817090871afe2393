"""The two ways to a token's log-probability: logits as they are, and a chunk of them at a time."""

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedConfig

from modules import scoring
from modules.backbones.masks import plain_head
from modules.engine import Decoding, GroupSampler, LocalEngine
from modules.scoring import collate, token_log_probs, token_loss
from tests.conftest import make_backbone, make_samples


@pytest.mark.parametrize("exploring", [False, True])
def test_many_logits_are_scored_as_few_are(monkeypatch: pytest.MonkeyPatch, exploring: bool) -> None:
    backbone = make_backbone()
    requests = GroupSampler(3).requests(make_samples(2), seed=0)
    batch = collate(backbone, LocalEngine().rollout(backbone, requests, Decoding(0.8, max_turn_tokens=8)))
    backbone.learn()

    def scored() -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        backbone.zero_grad()
        log_probs, entropy = token_log_probs(backbone, batch, 4096, exploring)
        loss = (log_probs * torch.linspace(-1, 1, len(log_probs))).sum() + (entropy.sum() if exploring else 0.0)
        loss.backward()
        gradients = {n: p.grad.clone() for n, p in backbone.named_parameters() if p.grad is not None}
        return log_probs.detach(), entropy, gradients

    whole = scored()
    calls = []
    monkeypatch.setattr(scoring, "AT_ONCE", 7 * len(backbone.banned))
    counted = scoring.linear_log_probs
    monkeypatch.setattr(scoring, "linear_log_probs", lambda *a: (calls.append(a[-1]), counted(*a))[1])
    chunked = scored()
    assert calls == [7]
    assert len(batch.targets) > 7
    assert chunked[1].requires_grad == whole[1].requires_grad == exploring
    torch.testing.assert_close(chunked[:2], whole[:2], rtol=0, atol=2e-6)
    assert chunked[2].keys() == whole[2].keys()
    for name, gradient in chunked[2].items():
        torch.testing.assert_close(gradient, whole[2][name], rtol=1e-4, atol=2e-5, msg=name)


def test_a_loss_of_many_logits_is_that_of_few(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = make_backbone()
    requests = GroupSampler(3).requests(make_samples(2), seed=0)
    batch = collate(backbone, LocalEngine().rollout(backbone, requests, Decoding(0.8, max_turn_tokens=8)))
    backbone.learn()
    factors = torch.linspace(-1, 1, len(batch.targets))
    calls: list[slice] = []

    def terms(log_probs: Tensor, entropy: Tensor, own: slice) -> Tensor:
        calls.append(own)
        return ((log_probs - batch.log_probs[own]).exp() * factors[own]).sum() - 0.1 * entropy.sum()

    def gradients(**options: bool) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        backbone.zero_grad()
        loss, log_probs, entropy = token_loss(backbone, batch, 4096, terms, entropy_gradient=True, **options)
        loss.backward()
        return (
            loss.detach(),
            log_probs,
            entropy,
            {n: p.grad for n, p in backbone.named_parameters() if p.grad is not None},
        )

    whole = gradients()
    assert calls == [slice(0, len(batch.targets))]
    monkeypatch.setattr(scoring, "AT_ONCE", 7 * len(backbone.banned))
    chunked = gradients()
    assert len(calls) > 2
    assert calls[1] == slice(0, 7)
    calls.clear()
    at_once = gradients(whole=True)
    assert calls == [slice(0, len(batch.targets))]
    torch.testing.assert_close(at_once, chunked, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(chunked[:3], whole[:3], rtol=0, atol=2e-5)
    assert chunked[3].keys() == whole[3].keys()
    for name, gradient in chunked[3].items():
        torch.testing.assert_close(gradient, whole[3][name], rtol=1e-4, atol=2e-5, msg=name)


def test_logits_that_are_changed_behind_the_output_layer_are_not_taken_for_its_outputs() -> None:
    backbone = make_backbone()
    assert backbone.linear_head is backbone.language.get_output_embeddings()
    for changed in ({"logit_scale": 0.5}, {"logits_scaling": 2.0}, {"final_logit_softcapping": 30.0}):
        assert plain_head(backbone.language, PreTrainedConfig(**changed)) is None
