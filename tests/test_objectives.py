"""Objectives: settings that cannot act are refused, and the presets are what they say they are."""

from __future__ import annotations

from dataclasses import asdict, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

import train
from commands.cli import CLI, without_false_alarms
from modules.functional.advantages import group_advantages
from modules.functional.losses import token_weights
from modules.functional.policy_gradient import rgrpo_loss
from modules.lora import LoRA
from modules.objective import Objective
from modules.policy import PolicyError
from modules.rgrpo import RGRPOModule
from tests.conftest import make_backbone

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
PRESETS = ("paper", "code", "dapo", "dr_grpo", "gspo")
COMMAND = ("base", "rgrpo")  # of the quickstart, which the presets are put behind


class Parsed(CLI):
    """The command line, which stops at the objects that it has made."""

    def _run_subcommand(self, subcommand: str) -> None:
        pass


@pytest.fixture(scope="module")
def objectives(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Objective]:
    """Each preset as `train.py fit` reads it, behind the quickstart's files; and what those say without one."""
    found = {}
    for name in ("quickstart", *PRESETS):
        files = [CONFIGS / "quickstart" / f"{part}.yaml" for part in COMMAND]
        files += [CONFIGS / "objectives" / f"{name}.yaml"] if name in PRESETS else []
        folder = tmp_path_factory.mktemp(name)
        with without_false_alarms():
            run = Parsed(["fit", *(f"--config={file}" for file in files), f"--run_dir={folder}"])
        assert isinstance(run.model, RGRPOModule)
        found[name] = run.model.objective
    return found


STATED: dict[str, dict[str, Any]] = {
    "paper": {"epsilon": 0.0, "ratio_to": "reference", "clip_low": 1.0, "clip_high": float("inf"), "beta": 0.04},
    "code": {"clip_high": 0.28},
    "dapo": {
        "epsilon": 0.0,
        "clip_high": 0.28,
        "normalisation": "token",
        "mask_truncated": True,
        "drop_zero_variance": True,
        "resample": 10,
        "mini_batches": 16,
    },
    "dr_grpo": {"scale_by_std": False, "normalisation": "constant", "constant": 2048},
    "gspo": {"epsilon": 0.0, "ratio_level": "sequence", "clip_low": 3e-4, "clip_high": 4e-4, "mini_batches": 4},
}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_what_it_states_whatever_came_before(objectives: dict[str, Objective], name: str) -> None:
    """The quickstart sets the normalisation and leaves out the standard deviation: nothing of it may stay."""
    assert objectives["quickstart"] == Objective(scale_by_std=False, normalisation="token")
    assert objectives[name] == Objective(**{"drop_zero_variance": False, **STATED[name]})


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_opens_with_its_command_and_writes_every_argument_out(name: str) -> None:
    lines = (CONFIGS / "objectives" / f"{name}.yaml").read_text().splitlines()
    start = lines.index("model:")
    (command,) = [line for line in lines[:start] if "python train.py fit" in line]
    assert command.startswith("#")
    assert command.endswith(f"--config configs/objectives/{name}.yaml")
    for word in command.split("--config ")[1:]:
        assert (ROOT / word.strip()).is_file()
    assert [line.split(":")[0].strip() for line in lines[start + 4 :]] == [field.name for field in fields(Objective)]


def test_the_example_of_credit_by_turn_changes_the_credit_alone() -> None:
    written = yaml.safe_load((CONFIGS / "objectives" / "region_credit.yaml").read_text())
    assert written["model"]["init_args"]["objective"] == asdict(replace(Objective(), credit="turn"))


def loss(objective: Objective) -> Tensor:
    """Of two groups of random trajectories at a later inner step, with what an objective says."""
    generator = torch.Generator().manual_seed(0)
    owners = torch.repeat_interleave(torch.arange(6), torch.tensor([4, 9, 1, 7, 3, 6]))
    sampler, drift, reference = (torch.randn(30, generator=generator) / 5 for _ in range(3))
    totals = torch.tensor([[0.0, 1.0, 0.5], [0.2, 0.0, 1.0]])
    advantages = group_advantages(
        totals, scale_by_std=objective.scale_by_std, epsilon=objective.epsilon, baseline=objective.baseline
    ).flatten()
    weights, count = token_weights(owners, 6, objective.normalisation, objective.constant)
    total, _ = rgrpo_loss(
        sampler + drift,
        sampler,
        advantages[owners],
        weights,
        owners,
        6,
        clip_low=objective.clip_low,
        clip_high=objective.clip_high,
        ratio_to=objective.ratio_to,
        ratio_level=objective.ratio_level,
        beta=objective.beta,
        reference_log_probs=reference if objective.needs_reference else None,
    )
    return total / count


def test_every_preset_has_a_loss_of_its_own(objectives: dict[str, Objective]) -> None:
    found = {name: loss(objective).item() for name, objective in objectives.items()}
    values = sorted(found.values())
    assert len(found) == 6
    assert min(b - a for a, b in pairwise(values)) > 1e-5, found


def test_the_command_line_names_what_cannot_act(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    files = [f"--config={CONFIGS / 'quickstart' / part}.yaml" for part in COMMAND]
    option = "--model.init_args.objective.sync_reference=5"
    with pytest.raises(SystemExit) as stop:
        train.main(["fit", *files, option, f"--run_dir={tmp_path}"])
    assert stop.value.code == 2
    assert "`objective.sync_reference` to be None, but got 5, which acts only with a `beta`" in capsys.readouterr().err


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"beta": -0.1}, "`objective.beta` to be at least 0, but got -0.1"),
    ({"clip_low": float("nan")}, "`objective.clip_low` to be at least 0, but got nan"),
    ({"entropy_bonus": -1.0}, "`objective.entropy_bonus` to be at least 0"),
    ({"truncation_penalty": -1.0}, "`objective.truncation_penalty` to be at least 0"),
    ({"inner_epochs": 0}, "`objective.inner_epochs` to be at least 1, but got 0"),
    ({"mini_batches": 0}, "`objective.mini_batches` to be at least 1"),
    ({"resample": 0}, "`objective.resample` to be at least 1"),
    ({"beta": 0.1, "sync_reference": 0}, "`objective.sync_reference` to be at least 1"),
    ({"sampler_correction": 0.0}, "`objective.sampler_correction` to be above 0"),
    ({"normalisation": "constant"}, "`objective.constant` to be given"),
    ({"constant": 30}, "`objective.constant` to be None, but got 30, which acts only with `normalisation: constant`"),
    ({"scale_by_std": False, "epsilon": 0.1}, "`objective.epsilon` .* acts only with `scale_by_std: true`"),
    ({"kl": "k1"}, "`objective.kl` to be 'k3', but got 'k1', which acts only with a `beta` above 0"),
    ({"kl_in": "reward"}, "`objective.kl_in` .* acts only with a `beta` above 0"),
    ({"unbiased_kl": True}, "`objective.unbiased_kl` .* acts only with a `beta` above 0"),
    ({"unbiased_kl": True, "beta": 0.1, "kl_in": "reward"}, "`objective.unbiased_kl` .* `kl_in: loss`"),
    ({"unbiased_kl": True, "beta": 0.1, "kl": "k2"}, "`objective.unbiased_kl` .* k1 or k3"),
    ({"kl": "k1", "beta": 0.1}, "`objective.unbiased_kl: true` or `kl_in: reward` .* zero on average"),
    ({"credit": "turn", "ratio_level": "sequence"}, "`objective.credit` .* acts only with `ratio_level: token`"),
    ({"drop_zero_variance": False, "min_spread": 0.1}, "`objective.min_spread` .* `drop_zero_variance: true`"),
    ({"drop_zero_variance": False, "resample": 2}, "`objective.resample` .* `drop_zero_variance: true`"),
    ({"kl_in": "reward", "beta": 0.1, "resample": 2}, "`objective.resample` .* `kl_in: loss`"),
    ({"ratio_to": "reference", "sampler_correction": 2.0}, "`objective.sampler_correction` .* `ratio_to: sampler`"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED)
def test_what_cannot_act_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Objective(**settings)


ACCEPTED: list[dict[str, Any]] = [
    {"kl": "k1", "beta": 0.1, "kl_in": "reward"},
    {"kl": "k1", "beta": 0.1, "unbiased_kl": True},
    {"kl": "k2", "beta": 0.1},
    {"kl": "k2", "ratio_to": "reference"},  # it is logged
    {"ratio_to": "reference", "sync_reference": 3},
    {"ratio_level": "sequence", "sampler_correction": 2.0},
    {"mask_truncated": True, "truncation_penalty": 1.0},  # others of the group are compared with it
    {"resample": 5, "min_spread": 0.1},
    {"credit": "turn", "baseline": "leave_one_out", "beta": 0.1, "kl_in": "reward"},
]


@pytest.mark.parametrize("settings", ACCEPTED)
def test_what_acts_is_taken(settings: dict[str, Any]) -> None:
    assert asdict(Objective(**settings)) == {**asdict(Objective()), **settings}
    assert replace(Objective(), **settings) != Objective()


def test_defaults_are_grpo_around_the_sampler() -> None:
    """What a run without any of these settings has done so far."""
    assert not Objective().needs_reference
    assert not Objective().changes_rewards
    acting = {"scale_by_std": True, "epsilon": 1e-4, "clip_low": 0.2, "clip_high": 0.2, "drop_zero_variance": True}
    assert {name: value for name, value in asdict(Objective()).items() if name in acting} == acting
    assert asdict(Objective())["baseline"] == "mean"


def test_adapters_have_no_reference_to_synchronise() -> None:
    with pytest.raises(PolicyError, match=r"`objective\.sync_reference` to be None with `lora`, but got 4"):
        RGRPOModule(make_backbone(), objective=Objective(beta=0.1, sync_reference=4), lora=LoRA(rank=2))
