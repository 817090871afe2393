"""Whether a backbone says the same token by token, in a rollout, as in one pass, where it learns."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from modules.backbones.base import Backbone
from modules.engine import Decoding, Flight, Request
from modules.policy import PolicyError
from modules.scoring import collate
from modules.trajectory import Region, Sample, StopReason, Trajectory, Visual

STEPS = 9  # written tokens a trajectory
CELLS = 24  # the image has at least so many cells of the patch grid: portrait and landscape crops of it then differ
BLOCK = 8  # pixels; the image is flat blocks of random colours, for any two crops of fine noise look alike
VISIBLE = 1e-3  # standard deviations: what is less is no effect
LARGEST_OF_MANY = 5  # standard deviations: about what the largest of 10^5 to 10^7 differences of a normal one comes to


@dataclass(frozen=True)
class Parity:
    """What a self-check found.

    Args:
        difference: the greatest absolute difference of a logit between the two passes.
        std: the logits' standard deviation.
        tolerance: how much they may differ, as a share of that.
        control: the greatest change of a logit behind a crop when that crop is exchanged for another one.
        layer: the first decoder layer whose outputs differ, as in ``named_modules``; None if the logits do not, or
            if they differ only behind the layers.
    """

    difference: float
    std: float
    tolerance: float
    control: float
    layer: str | None = None

    @property
    def same(self) -> bool:
        """Whether both passes give the same logits; NaN never are."""
        return self.difference <= self.tolerance * self.std

    @property
    def sees_crops(self) -> bool:
        """Whether a crop changes what is said behind it: visibly, and by more than the passes differ.

        Not by more than the tolerance, for rounding is no part of it (but for the crop, the same is computed twice),
        and at random weights in half precision crops change less than that.
        """
        return self.control > max(self.difference, VISIBLE * self.std)


def check(backbone: Backbone, tolerance: float | None = None) -> Parity:
    """Stop a backbone whose rollouts would be of another policy than the one that learns; see `measure`.

    Raises:
        PolicyError: the passes differ, or exchanging a crop changes nothing. It names the backbone's class, how
            large the difference is and, of the decoder's layers, the first that differs.
    """
    parity = measure(backbone, tolerance)
    name = type(backbone).__name__
    if not parity.same:
        found = (
            f"the first layer to differ is `{parity.layer}`" if parity.layer else "its layers do not, look behind them"
        )
        raise PolicyError(
            f"Expected {name} to give the same logits token by token as in one pass, but they differ by "
            f"{parity.difference:.3g} (their standard deviation is {parity.std:.3g}, tolerance {parity.tolerance:g} of "
            f"it); {found}."
        )
    if not parity.sees_crops:
        raise PolicyError(
            f"Expected {name} to see its crops, but with another crop the logits behind it change by "
            f"{parity.control:.3g} only (their standard deviation is {parity.std:.3g}, rounding changes them by "
            f"{parity.difference:.3g})."
        )
    return parity


def measure(backbone: Backbone, tolerance: float | None = None) -> Parity:
    """Play two made-up trajectories, of two crops and of one, both ways.

    Once as a rollout does, by the engine's own steps: ragged rows, single tokens, a crop in one row while the other
    goes on writing. Once as the learner does, packed. Their logits are compared wherever text is written. Modes,
    random numbers and caches are afterwards what they were.

    Args:
        backbone: on its device.
        tolerance: see `default_tolerance`.

    Raises:
        PolicyError: not even an image and one crop fit into the context.
    """
    tolerance = default_tolerance(backbone) if tolerance is None else tolerance
    with undisturbed(backbone):
        rows = scripts(backbone)
        rolled = roll_out(backbone, rows)
        exchanged = [exchange_last_crop(rolled.trajectories[0]), *rolled.trajectories[1:]]
        token_by_token = backbone.head(rolled.hidden).float()
        at_once = backbone.head(learn(backbone, rolled.trajectories)).float()
        other = backbone.head(learn(backbone, exchanged)).float()
        behind = slice(max(rows[0].crops) + 1, STEPS)  # of the first trajectory
        parity = Parity(
            difference=float((token_by_token - at_once).abs().max()),
            std=float(at_once.std()),
            tolerance=tolerance,
            control=float((other - at_once)[behind].abs().max()),
        )
        return parity if parity.same else replace(parity, layer=first_different(backbone, rows, tolerance))


def default_tolerance(backbone: Backbone) -> float:
    """How much logits may differ by rounding alone, as a share of their standard deviation.

    In float32 a thousandth: sums in another order differ by 1e-5 or less, while a position that is off by one moves
    logits by a tenth and more. In half precision a quarter: of models that are exact in float32, the greatest
    difference of all logits was 0.02 to 0.14, at standard deviations of 1 to 4. What a mistake changes by less than
    that is not found: check a new backbone in float32.
    """
    return 1e-3 if computing_dtype(backbone) in (torch.float32, torch.float64) else 0.25


def computing_dtype(backbone: Backbone) -> torch.dtype:
    """The dtype that most is computed in: autocast's inside of it, else the shortest of the weights'."""
    kind = backbone.device.type
    if torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return min((p.dtype for p in backbone.parameters() if p.is_floating_point()), key=lambda dtype: dtype.itemsize)


@dataclass(frozen=True, eq=False)
class Script:
    """All of a trajectory but its prompt, without a policy that would have to think of it."""

    sample: Sample
    written: Tensor  # (STEPS,) long
    crops: dict[int, Visual]  # number of a written token -> what is shown behind it
    shown: dict[int, Tensor]  # the ids by which it is shown


def scripts(backbone: Backbone) -> list[Script]:
    """Two trajectories about one image: of two crops, portrait and landscape, and of one.

    Raises:
        PolicyError: not even an image and one crop fit into the context.
    """
    generator = torch.Generator().manual_seed(0)
    height, width = image_size(backbone)
    blocks = torch.randint(0, 256, (3, -(-height // BLOCK), -(-width // BLOCK)), generator=generator, dtype=torch.uint8)
    image = blocks.repeat_interleave(BLOCK, 1).repeat_interleave(BLOCK, 2)[:, :height, :width]
    words = ~backbone.banned.cpu()
    words[sorted(backbone.eos_ids)] = False
    words = words.nonzero()[:, 0]
    written = words[torch.randint(len(words), (2, STEPS), generator=generator)]
    # in words that the tokenizer knows, and of two lengths
    samples = [Sample("self-check", backbone.detokenize(written[k, : 4 + 2 * k]), (image,)) for k in range(2)]
    portrait = Region((0.0, 0.0, width / 3, float(height)))
    landscape = Region((width / 4, height / 2, float(width), float(height)))
    return [
        script(backbone, samples[0], written[0], {1: portrait, 5: landscape}),
        script(backbone, samples[1], written[1], {3: landscape}),
    ]


def script(backbone: Backbone, sample: Sample, written: Tensor, looks: dict[int, Region]) -> Script:
    """A trajectory that looks at regions behind written tokens of these numbers; as often as the context allows."""
    crops = dict(zip(looks, backbone.look([sample.images[0]] * len(looks), list(looks.values())), strict=True))
    shown = {step: backbone.visual_ids(*crop.pixels.shape[-2:]) for step, crop in crops.items()}
    text = len(backbone.prompt_ids(sample, backbone.see(sample.images))) + len(written)
    lengths = torch.tensor([len(ids) for ids in shown.values()]).cumsum(0) + text
    room = int((lengths <= backbone.context_length).sum())
    if room == 0:
        raise PolicyError(
            f"Expected the context of {type(backbone).__name__} to hold an image and a crop for the self-check, "
            f"{int(lengths[0])} tokens, but it holds {backbone.context_length}."
        )
    fit = list(looks)[:room]
    return Script(sample, written, {step: crops[step] for step in fit}, {step: shown[step] for step in fit})


def image_size(backbone: Backbone) -> tuple[int, int]:
    """(height, width) of a landscape image about as small as the backbone takes it without enlarging it."""
    if backbone.image_scaler.zoom is None:
        return 64, 96
    grid, least, _ = backbone.image_scaler.zoom
    unit = math.sqrt(max(CELLS * grid**2, 1.1 * least) / 6)
    return math.ceil(2 * unit), math.ceil(3 * unit)


@dataclass(frozen=True, eq=False)
class Rolled:
    """What a rollout of B scripts gave."""

    trajectories: list[Trajectory]
    hidden: Tensor  # (B * STEPS, D) where a written token is predicted, trajectory after trajectory
    last: Tensor  # (STEPS, B) long, which of a step's tokens, in each trajectory, these positions are


def roll_out(backbone: Backbone, rows: Sequence[Script]) -> Rolled:
    """Play scripts as a rollout does: by the engine's own steps."""
    flight = Flight(backbone, [Request(row.sample, 0) for row in rows], Decoding())
    hidden = [flight.hidden]
    last = [[len(row.prompt) - 1 for row in flight.rows]]
    for step in range(STEPS - 1):  # behind the last written token nothing is predicted
        ids = torch.stack([row.written[step] for row in rows])
        shown = {k: (row.shown[step], [row.crops[step]]) for k, row in enumerate(rows) if step in row.crops}
        flight.advance(ids.to(backbone.device), shown)
        hidden.append(flight.hidden)
        last.append([len(row.shown.get(step, ())) for row in rows])
    trajectories = [played(row, state.prompt, state.visuals) for row, state in zip(rows, flight.rows, strict=True)]
    return Rolled(trajectories, torch.stack(hidden, 1).flatten(0, 1), torch.tensor(last, device=backbone.device))


def played(row: Script, prompt: Tensor, images: Sequence[Visual]) -> Trajectory:
    """The trajectory of a script."""
    nothing = row.written[:0]
    steps = [torch.cat([row.written[k : k + 1], row.shown.get(k, nothing)]) for k in range(STEPS)]
    ids = torch.cat(steps)
    sampled = torch.cat([torch.arange(len(step)) == 0 for step in steps])
    return Trajectory(
        sample=row.sample,
        prompt_ids=prompt,
        completion_ids=ids,
        sampled=sampled,
        log_probs=torch.zeros(len(ids), dtype=torch.float32),
        coordinates=torch.full((len(ids),), torch.nan, dtype=torch.float32),
        visuals=(*images, *row.crops.values()),
        turns=(),
        stop=StopReason.EOS,
        answer=None,
        text="",
    )


def exchange_last_crop(trajectory: Trajectory) -> Trajectory:
    """The trajectory as if its last crop had been the negative of itself."""
    crop = trajectory.visuals[-1]
    negative = Visual(1 - crop.pixels, crop.tokens, crop.role)
    return replace(trajectory, visuals=(*trajectory.visuals[:-1], negative))


def learn(backbone: Backbone, trajectories: Sequence[Trajectory]) -> Tensor:
    """(T, D) hidden states of the learner's pass where written tokens are predicted."""
    batch = collate(backbone, trajectories)
    return backbone.hidden_states(batch).flatten(0, 1)[batch.predictors]


def first_different(backbone: Backbone, rows: Sequence[Script], tolerance: float) -> str | None:
    """The name of the first decoder layer whose outputs differ between the two passes.

    What counts is ||a - b|| / ||b|| at the worst position. Logits are projections of the outputs, and the worst of
    very many lies several standard deviations out: layers differ from so much less on.
    """
    layers = {
        name: module
        for name, module in backbone.named_modules()
        if isinstance(module, GradientCheckpointingLayer)
        and all(backbone.part(f"{name}.{own}") == "language" for own, _ in module.named_parameters())
    }
    rollouts = []
    for row in rows:  # each alone: then every step is one pass
        with outputs_of(layers) as rolled:
            rollouts.append((rolled, roll_out(backbone, [row])))
    batch = collate(backbone, [rollout.trajectories[0] for _, rollout in rollouts])
    with outputs_of(layers) as learned:
        backbone.hidden_states(batch)
    for name in layers:
        if any(len(rolled[name]) != STEPS for rolled, _ in rollouts) or len(learned[name]) != 1:
            continue  # it does not run once a pass
        a = torch.cat(
            [
                torch.cat([outputs[0, last] for outputs, last in zip(rolled[name], rollout.last, strict=True)])
                for rolled, rollout in rollouts
            ]
        ).float()
        b = learned[name][0].flatten(0, 1)[batch.predictors].float()
        worst = float(((a - b).norm(dim=-1) / b.norm(dim=-1)).max())
        if not worst <= tolerance / LARGEST_OF_MANY:  # NaN differs
            return name
    return None


@contextmanager
def outputs_of(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, list[Tensor]]]:
    """What each module returns, call by call; of a tuple the first."""
    outputs: dict[str, list[Tensor]] = {name: [] for name in modules}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            outputs[name].append(output if isinstance(output, Tensor) else output[0])

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def undisturbed(backbone: Backbone) -> Iterator[None]:
    """Evaluation without gradients, float32 as float32; everything is as it was afterwards."""
    modes = {module: module.training for module in backbone.modules()}
    cudnn: Any = torch.backends.cudnn
    matmul, convolution = torch.get_float32_matmul_precision(), cudnn.conv.fp32_precision
    cards = [backbone.device] if backbone.device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(cards):
        try:
            backbone.eval()
            torch.set_float32_matmul_precision("highest")
            cudnn.conv.fp32_precision = "ieee"
            yield
        finally:
            cudnn.conv.fp32_precision = convolution
            torch.set_float32_matmul_precision(matmul)
            for module, mode in modes.items():
                module.training = mode
