"""Our losses and advantages equal TRL's: its own methods, run on real trainers of tiny random models.

Of TRL's R-GRPO path only the ends are replaced: the forward pass gives the log-probabilities of the test,
generation gives ids of the test, and reward functions give the rewards of the test, all in float64.
"""

from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.functional import pad
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from trl.trainer.callbacks import SyncRefModelCallback

from modules.functional.advantages import group_advantages
from modules.functional.kl import kl_estimate, per_trajectory
from modules.functional.losses import token_weights
from modules.functional.policy_gradient import rgrpo_loss
from modules.reference import ReferenceModule
from tests.conftest import make_backbone
from tests.trl_stand_ins import close, tiny_model, tiny_tokenizer

MAX_LENGTH = 10
# TRL's loss type, our normalisation, its constant. One micro-batch: "bnpo" is "dapo".
LOSS_TYPES = [
    ("grpo", "sequence", None),
    ("bnpo", "token", None),
    ("dapo", "token", None),
    ("dr_grpo", "constant", MAX_LENGTH),
]


@pytest.fixture(scope="module")
def grpo(tmp_path_factory: pytest.TempPathFactory) -> GRPOTrainer:
    return GRPOTrainer(
        model=tiny_model(),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=GRPOConfig(
            output_dir=str(tmp_path_factory.mktemp("grpo")),
            per_device_train_batch_size=4,
            num_generations=4,
            max_completion_length=MAX_LENGTH,
            use_cpu=True,
            bf16=False,
            report_to=[],
        ),
        train_dataset=Dataset.from_dict({"prompt": ["w2", "w3", "w4", "w5"]}),
        processing_class=tiny_tokenizer(),
    )


@pytest.fixture(scope="module")
def rloo(tmp_path_factory: pytest.TempPathFactory) -> RLOOTrainer:
    return RLOOTrainer(
        model=tiny_model(),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=RLOOConfig(
            output_dir=str(tmp_path_factory.mktemp("rloo")),
            per_device_train_batch_size=4,
            num_generations=4,
            max_completion_length=MAX_LENGTH,
            beta=0.0,  # else a reference is looked for by the model's name
            use_cpu=True,
            bf16=False,
            report_to=[],
        ),
        train_dataset=Dataset.from_dict({"prompt": ["w2", "w3", "w4", "w5"]}),
        processing_class=tiny_tokenizer(),
    )


class Step:
    """Eight random trajectories, padded as TRL holds them; the sampled tokens have holes, as crops leave them."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        lengths = torch.tensor([10, 3, 7, 1, 9, 0, 4, 10])  # one wrote nothing
        self.completion_mask = (torch.arange(MAX_LENGTH) < lengths[:, None]).long()
        self.tool_mask = (torch.rand(8, MAX_LENGTH, generator=generator) > 0.25).long()
        self.tool_mask[:, 0] = 1  # the policy writes first
        self.sampler = -draw(8, MAX_LENGTH).abs()
        self.log_probs = (self.sampler + draw(8, MAX_LENGTH) / 3).requires_grad_()
        self.reference = self.sampler + draw(8, MAX_LENGTH) / 3
        self.advantages = draw(8)
        self.entropy = draw(8, MAX_LENGTH).abs().requires_grad_()
        self.engine = self.sampler + draw(8, MAX_LENGTH) / 3  # of a sampler apart from the learner
        self.sampled = (self.completion_mask * self.tool_mask).bool()


def trl_loss(
    trainer: GRPOTrainer,
    monkeypatch: pytest.MonkeyPatch,
    step: Step,
    rows: slice,
    *,
    unbiased_kl: bool = False,
    completion_mask: Tensor | None = None,
    extra: dict[str, Tensor] | None = None,
    **settings: Any,
) -> Tensor:
    """``GRPOTrainer._compute_loss`` of one micro-batch, whose forward pass gives ``step.log_probs``."""
    assert hasattr(trainer.args, "use_bias_correction_kl")
    monkeypatch.setattr(trainer.args, "use_bias_correction_kl", unbiased_kl)
    for name, value in {"epsilon_low": 0.2, "epsilon_high": 0.28, "beta": 0.0, **settings}.items():
        assert hasattr(trainer, name)  # a renamed attribute must not be set in vain
        monkeypatch.setattr(trainer, name, value)
    log_probs = step.log_probs[rows]
    monkeypatch.setattr(
        trainer,
        "_get_per_token_logps_and_entropies",
        lambda *_, **__: (log_probs, step.entropy[rows], None),
    )
    mask = step.completion_mask if completion_mask is None else completion_mask
    inputs = {
        "prompt_ids": torch.full((8, 2), 2)[rows],
        "prompt_mask": torch.ones(8, 2, dtype=torch.long)[rows],
        "completion_ids": torch.full((8, MAX_LENGTH), 3)[rows],
        "completion_mask": mask[rows],
        "tool_mask": step.tool_mask[rows],
        "advantages": step.advantages[rows],
        "old_per_token_logps": step.sampler[rows],
        "ref_per_token_logps": step.reference[rows],
        "num_items_in_batch": (mask * step.tool_mask).sum(),
        **{name: tensor[rows] for name, tensor in (extra or {}).items()},
    }
    return trainer._compute_loss(trainer.model, inputs)


def our_loss(
    step: Step,
    rows: slice,
    normalisation: str,
    constant: int | None,
    beta: float,
    *,
    unbiased_kl: bool = False,
    include: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, float, dict[str, Tensor]]:
    sampled = step.sampled[rows]
    owners = sampled.nonzero()[:, 0]
    weights, count = token_weights(
        owners, len(sampled), normalisation, constant, None if include is None else include[rows]
    )
    loss, metrics = rgrpo_loss(
        step.log_probs[rows][sampled],
        step.sampler[rows][sampled],
        step.advantages[rows][owners],
        weights,
        owners,
        len(sampled),
        **{
            "clip_low": 0.2,
            "clip_high": 0.28,
            "beta": beta,
            "unbiased_kl": unbiased_kl,
            "reference_log_probs": step.reference[rows][sampled] if beta else None,
            **options,
        },
    )
    return loss, count, metrics


EVERYTHING = slice(None)


@pytest.mark.parametrize(("beta", "unbiased_kl"), [(0.0, False), (0.04, False), (0.04, True)])
@pytest.mark.parametrize(("loss_type", "normalisation", "constant"), LOSS_TYPES)
def test_rgrpo_loss_and_gradient(
    grpo: GRPOTrainer,
    monkeypatch: pytest.MonkeyPatch,
    loss_type: str,
    normalisation: str,
    constant: int | None,
    beta: float,
    unbiased_kl: bool,
) -> None:
    step = Step()
    grpo.model.eval()  # TRL: no gradient accumulation
    theirs = trl_loss(grpo, monkeypatch, step, EVERYTHING, unbiased_kl=unbiased_kl, loss_type=loss_type, beta=beta)
    (their_gradient,) = torch.autograd.grad(theirs, step.log_probs)
    loss, count, _ = our_loss(step, EVERYTHING, normalisation, constant, beta, unbiased_kl=unbiased_kl)
    (our_gradient,) = torch.autograd.grad(loss / count, step.log_probs)
    torch.testing.assert_close(loss / count, theirs, **close)
    torch.testing.assert_close(our_gradient, their_gradient, **close)
    assert theirs.abs() > 1e-3
    assert (their_gradient != 0).sum() >= 15


def test_rgrpo_metrics(grpo: GRPOTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Step()
    grpo.model.eval()
    grpo._metrics["eval"].clear()
    trl_loss(grpo, monkeypatch, step, EVERYTHING, loss_type="grpo", beta=0.04)
    _, _, metrics = our_loss(step, EVERYTHING, "sequence", None, 0.04)
    tokens = step.sampled.sum()
    for ours, theirs in [("kl", "kl"), ("clip_low", "clip_ratio/low_mean"), ("clip_high", "clip_ratio/high_mean")]:
        (expected,) = grpo._metrics["eval"][theirs]
        assert expected > 0
        assert (metrics[ours] / tokens).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("loss_type", "normalisation", "constant"), LOSS_TYPES)
def test_excluded_trajectories_are_masked_truncated_completions(
    grpo: GRPOTrainer, monkeypatch: pytest.MonkeyPatch, loss_type: str, normalisation: str, constant: int | None
) -> None:
    step = Step()
    include = torch.tensor([True, True, False, True, False, True, True, True])
    grpo.model.eval()
    theirs = trl_loss(
        grpo,
        monkeypatch,
        step,
        EVERYTHING,
        completion_mask=step.completion_mask * include[:, None],
        loss_type=loss_type,
        beta=0.04,
    )
    loss, count, _ = our_loss(step, EVERYTHING, normalisation, constant, 0.04, include=include)
    torch.testing.assert_close(loss / count, theirs, **close)


@pytest.mark.parametrize(("loss_type", "normalisation", "constant"), [row for row in LOSS_TYPES if row[0] != "bnpo"])
def test_gradient_accumulation(
    grpo: GRPOTrainer, monkeypatch: pytest.MonkeyPatch, loss_type: str, normalisation: str, constant: int | None
) -> None:
    """Two micro-batches: TRL scales each loss and adds, we add sums and divide once."""
    step = Step()
    grpo.model.train()
    # the training loop sets it, there is none before
    monkeypatch.setattr(grpo, "current_gradient_accumulation_steps", 2, raising=False)
    monkeypatch.setattr(grpo.args, "steps_per_generation", 2)
    halves = [slice(0, 4), slice(4, 8)]
    theirs = sum(trl_loss(grpo, monkeypatch, step, rows, loss_type=loss_type, beta=0.04) for rows in halves)
    ours = [our_loss(step, rows, normalisation, constant, 0.04) for rows in halves]
    torch.testing.assert_close(sum(loss for loss, _, _ in ours) / sum(count for _, count, _ in ours), theirs, **close)


@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize(("loss_type", "normalisation", "constant"), LOSS_TYPES)
def test_sequence_ratio(
    grpo: GRPOTrainer,
    monkeypatch: pytest.MonkeyPatch,
    loss_type: str,
    normalisation: str,
    constant: int | None,
    beta: float,
) -> None:
    """GSPO, with clips that act on these ratios."""
    step = Step()
    grpo.model.eval()
    clips = {"epsilon_low": 0.05, "epsilon_high": 0.06}
    theirs = trl_loss(
        grpo,
        monkeypatch,
        step,
        EVERYTHING,
        loss_type=loss_type,
        beta=beta,
        importance_sampling_level="sequence",
        **clips,
    )
    loss, count, metrics = our_loss(
        step, EVERYTHING, normalisation, constant, beta, ratio_level="sequence", clip_low=0.05, clip_high=0.06
    )
    by_token, _, _ = our_loss(step, EVERYTHING, normalisation, constant, beta, clip_low=0.05, clip_high=0.06)
    torch.testing.assert_close(loss / count, theirs, **close)
    torch.testing.assert_close(
        torch.autograd.grad(loss / count, step.log_probs), torch.autograd.grad(theirs, step.log_probs), **close
    )
    assert metrics["clip_low"] + metrics["clip_high"] > 0
    assert (loss - by_token).abs() > 1e-3


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize(("loss_type", "normalisation", "constant"), LOSS_TYPES)
def test_sampler_correction(
    grpo: GRPOTrainer,
    monkeypatch: pytest.MonkeyPatch,
    loss_type: str,
    normalisation: str,
    constant: int | None,
    level: str,
) -> None:
    """Its `vllm_importance_sampling_mode="token_truncate"`; the weights are made as its scoring makes them."""
    step, cap = Step(), 1.3
    grpo.model.eval()
    weights = torch.exp((step.sampler - step.engine) * step.sampled).clamp(max=cap)
    theirs = trl_loss(
        grpo,
        monkeypatch,
        step,
        EVERYTHING,
        loss_type=loss_type,
        beta=0.04,
        importance_sampling_level=level,
        use_vllm=True,
        vllm_importance_sampling_correction=True,
        extra={"importance_sampling_ratio": weights},
    )
    step.sampler, learner = step.engine, step.sampler
    loss, count, metrics = our_loss(
        step,
        EVERYTHING,
        normalisation,
        constant,
        0.04,
        ratio_level=level,
        correction_cap=cap,
        learner_log_probs=learner[step.sampled],
    )
    torch.testing.assert_close(loss / count, theirs, **close)
    torch.testing.assert_close(
        torch.autograd.grad(loss / count, step.log_probs), torch.autograd.grad(theirs, step.log_probs), **close
    )
    torch.testing.assert_close(metrics["sampler_correction"], weights[step.sampled].sum(), **close)
    assert metrics["sampler_correction_capped"] == (weights[step.sampled] == cap).sum() > 3


@pytest.mark.parametrize("loss_type", ["bnpo", "dapo"])
def test_entropy_bonus(grpo: GRPOTrainer, monkeypatch: pytest.MonkeyPatch, loss_type: str) -> None:
    """TRL's is a mean over tokens whatever the loss type; ours has the loss's weights, here the same."""
    step = Step()
    grpo.model.eval()
    settings = {"_entropy_bonus_enabled": True, "entropy_coef": 0.3, "use_adaptive_entropy": False}
    theirs = trl_loss(grpo, monkeypatch, step, EVERYTHING, loss_type=loss_type, **settings)
    loss, count, _ = our_loss(
        step, EVERYTHING, "token", None, 0.0, entropy_bonus=0.3, entropy=step.entropy[step.sampled]
    )
    inputs = (step.log_probs, step.entropy)
    torch.testing.assert_close(loss / count, theirs, **close)
    gradients = torch.autograd.grad(theirs, inputs)
    torch.testing.assert_close(torch.autograd.grad(loss / count, inputs), gradients, **close)
    assert gradients[1].abs().max() > 1e-3


@pytest.mark.parametrize("columns", [1, 7])
def test_padding_changes_nothing(grpo: GRPOTrainer, monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    """TRL's loss of a batch padded further is still ours, of a batch without padding."""
    step = Step()
    grpo.model.eval()
    loss, count, _ = our_loss(step, EVERYTHING, "sequence", None, 0.04, ratio_level="sequence")
    for name in ("completion_mask", "tool_mask", "sampler", "log_probs", "reference", "entropy"):
        setattr(step, name, pad(getattr(step, name), (0, columns)))
    theirs = trl_loss(
        grpo, monkeypatch, step, EVERYTHING, loss_type="grpo", beta=0.04, importance_sampling_level="sequence"
    )
    torch.testing.assert_close(loss / count, theirs, **close)


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_leave_one_out_and_kl_in_the_reward(rloo: RLOOTrainer, monkeypatch: pytest.MonkeyPatch, beta: float) -> None:
    """``RLOOTrainer._generate_and_score_completions``: rewards less beta times k1, over the mean of the others."""
    nan = float("nan")
    totals = torch.tensor([[1.0, 0.0, 0.0, 0.35], [0.5, 0.5, 0.5, 0.5], [nan, 1.0, 0.0, 0.5]], dtype=torch.float64)
    count = totals.numel()
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 6, (count,), generator=generator).tolist()
    old, reference = (-torch.rand(count, max(lengths), generator=generator, dtype=torch.float64) for _ in range(2))
    answers = iter([(old, None, None), (reference, None, None)])
    monkeypatch.setattr(
        rloo, "_generate", lambda prompts: ([[2]] * count, [[3] * (n - 1) + [1] for n in lengths], ["w3"] * count)
    )
    monkeypatch.setattr(rloo, "_calculate_rewards", lambda *_: totals.reshape(-1, 1))
    monkeypatch.setattr(rloo, "_get_per_token_logps_and_entropies", lambda *_, **__: next(answers))
    monkeypatch.setattr(rloo, "beta", beta)
    monkeypatch.setattr(rloo, "ref_model", rloo.model)
    assert not rloo.normalize_advantages
    rloo.model.train()
    output = rloo._generate_and_score_completions([{"prompt": "w2"}] * count)
    sampled = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    estimates = kl_estimate(old[sampled], reference[sampled], "k1")
    penalised = totals - beta * per_trajectory(estimates, sampled.nonzero()[:, 0], count).view_as(totals)
    ours = group_advantages(penalised, scale_by_std=False, epsilon=0.0, baseline="leave_one_out")
    torch.testing.assert_close(ours.reshape(-1), output["advantages"], **close)
    assert (ours[1].abs().max() > 0.01) == (beta > 0)


def test_synchronised_reference() -> None:
    """``SyncRefModelCallback`` with a mixture of the new policy alone."""
    policy = make_backbone(seed=1)
    ours, theirs = ReferenceModule(make_backbone(seed=0)), make_backbone(seed=0)
    ours.synchronise(policy)
    with torch.no_grad():
        SyncRefModelCallback._sync_target_model(policy, theirs, 1.0)
    for (name, own), their in zip(ours.backbone.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(own, their.detach(), msg=name)


@pytest.mark.parametrize(("scale_rewards", "scale_by_std"), [("group", True), ("none", False)])
def test_advantages(grpo: GRPOTrainer, monkeypatch: pytest.MonkeyPatch, scale_rewards: str, scale_by_std: bool) -> None:
    """``GRPOTrainer._generate_and_score_completions``, from generated ids and rewards to advantages."""
    nan = float("nan")
    totals = torch.tensor(
        [
            [1.0, 0.0, 0.0, 0.35],
            [0.5, 0.5, 0.5, 0.5],
            [0.1, 0.1, 0.1, 0.101],  # a tie but for a length reward
            [nan, 1.0, 0.0, 0.5],  # a judgement failed
            [nan, nan, nan, 0.2],
        ],
        dtype=torch.float64,
    )
    count = totals.numel()
    generated = ([[2]] * count, [[3, 1]] * count, None, ["w3"] * count, None, {}, None, None)
    monkeypatch.setattr(grpo, "_generate", lambda prompts: generated)
    monkeypatch.setattr(grpo, "_calculate_rewards", lambda *_: totals.reshape(-1, 1))
    monkeypatch.setattr(grpo, "scale_rewards", scale_rewards)
    assert grpo.num_generations == totals.shape[1]
    grpo.model.train()
    output = grpo._generate_and_score_completions([{"prompt": "w2"}] * count)
    ours = group_advantages(totals, scale_by_std=scale_by_std, epsilon=1e-4)
    torch.testing.assert_close(ours.reshape(-1), output["advantages"], **close)
