"""Our warm-up loss equals that of TRL and of transformers, on a real trainer of a tiny random model."""

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.functional import pad
from transformers.loss.loss_utils import ForCausalLMLoss
from trl import SFTConfig, SFTTrainer

from modules.functional.losses import coordinate_cross_entropy, selected_log_probs, token_weights
from tests.trl_stand_ins import VOCABULARY, close, tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def sft(tmp_path_factory: pytest.TempPathFactory) -> SFTTrainer:
    return SFTTrainer(
        model=tiny_model().double(),
        args=SFTConfig(
            output_dir=str(tmp_path_factory.mktemp("sft")),
            use_cpu=True,
            bf16=False,
            report_to=[],
            gradient_checkpointing=False,
        ),
        train_dataset=Dataset.from_dict({"input_ids": [[2, 3, 4]]}),
        processing_class=tiny_tokenizer(),
    )


def sft_batch() -> tuple[Tensor, Tensor]:
    """Ids and labels; -100 where no loss is carried: prompt, crops in the middle, padding."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, VOCABULARY, (4, 12), generator=generator)
    carries = torch.rand(4, 12, generator=generator) > 0.4
    carries[:, :3] = False
    carries[1, 6:] = False
    carries[2] = False
    return ids, torch.where(carries, ids, -100)


def our_sft_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, float]:
    """(sum by log-probabilities, sum by cross-entropy without coordinates, count)."""
    shifted = pad(labels, (0, 1), value=-100)[:, 1:]
    carries = shifted != -100
    owners, targets = carries.nonzero()[:, 0], shifted[carries]
    weights, count = token_weights(owners, len(labels), "token")
    log_probs, _ = selected_log_probs(logits[carries], targets)
    no_coordinates = torch.full(targets.shape, float("nan"))
    losses = coordinate_cross_entropy(logits[carries], targets, no_coordinates, torch.zeros(1, 1).long(), 1.0)
    return -(weights * log_probs).sum(), (weights * losses).sum(), count


def test_sft_loss_and_gradient_of_trl(sft: SFTTrainer) -> None:
    """``SFTTrainer.compute_loss`` over a real forward pass."""
    ids, labels = sft_batch()
    parameters = list(sft.model.parameters())
    items = (labels[:, 1:] != -100).sum()
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    theirs = sft.compute_loss(sft.model, inputs, num_items_in_batch=items)
    their_gradients = torch.autograd.grad(theirs, parameters)
    by_log_probs, by_cross_entropy, count = our_sft_loss(sft.model(input_ids=ids).logits, labels)
    assert count == items
    for ours in (by_log_probs, by_cross_entropy):
        torch.testing.assert_close(ours / count, theirs.double(), **close)  # TRL sums in float32
        gradients = torch.autograd.grad(ours / count, parameters, retain_graph=True)
        torch.testing.assert_close(gradients, their_gradients, **close)
    assert max(gradient.abs().max() for gradient in their_gradients) > 1e-3


def test_sft_gradient_accumulation_of_transformers() -> None:
    """``ForCausalLMLoss`` with ``num_items_in_batch``: micro-batches divided by the count of the whole step."""
    _, labels = sft_batch()
    logits = torch.randn(4, 12, VOCABULARY, generator=torch.Generator().manual_seed(1))
    items = (labels[:, 1:] != -100).sum()
    halves = [slice(0, 2), slice(2, 4)]
    theirs = sum(ForCausalLMLoss(logits[h], labels[h], VOCABULARY, num_items_in_batch=items) for h in halves)
    ours = [our_sft_loss(logits[h], labels[h]) for h in halves]
    torch.testing.assert_close(sum(o[0] for o in ours) / sum(o[2] for o in ours), theirs, **close)
    torch.testing.assert_close(sum(o[1] for o in ours) / sum(o[2] for o in ours), theirs, **close)
