"""How exact a backbone is: one sequence computed in every way that training and rollouts compute it.

    python -m benchmarks.parity --backbone qwen2_5_vl [--json]

A family of `benchmarks.families` (or ``timm_lm``) is built tiny and with random weights; anything else is a hub name
or a folder. All figures but ``control_*`` are largest absolute differences of logits,
log-probabilities, coordinates or numbers of tokens, and have to be near 0. Controls are the differences that a
mistake would make; they have to be large, or the others prove nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.utils import logging

from benchmarks.tiny import NAMES, QUESTIONS, THOUGHTS, backbone_of
from benchmarks.told import told
from modules.backbones.base import Backbone, visual_blocks
from modules.backbones.cache import RaggedCache
from modules.backbones.hf_vlm import HFVLMBackbone
from modules.backbones.timm_lm import TimmLMBackbone
from modules.engine import Decoding, LocalEngine, Request
from modules.environment import Look, respond
from modules.functional.grammar import BoxRequest, format_box, parse_turn
from modules.replay import Replayer
from modules.scoring import collate, token_log_probs
from modules.trajectory import Box, Region, Sample, Step, Trajectory, Visual

TOLERANCE = 1e-4
CONTROL = 0.1

ANSWER = "<answer>42</answer>"
REGIONS: tuple[Box, ...] = ((0.1, 0.1, 0.4, 0.9), (0.2, 0.6, 0.9, 0.9), (0.0, 0.0, 1.0, 1.0))  # shares of the image
LANDSCAPE, PORTRAIT = (90, 131), (121, 77)  # (height, width)
# For the round trips of boxes: odd sides, portrait and landscape, below and above the pixel limits
SIZES = ((37, 53), (53, 37), (90, 131), (301, 403), (403, 301), (29, 500), (1001, 1333))


def measure(backbone: Backbone) -> dict[str, float]:
    """Largest absolute differences between the ways in which a backbone computes the same thing.

    Args:
        backbone: in float32.

    Returns:
        ``full_vs_native``: the learner's full pass against the model's own forward: an image and two crops
            (``_portrait``: on an image that stands; ``_no_crops``: an image; ``_text_only``: neither); logits.
        ``incremental_vs_full``: ragged rows of 0 to 3 crops through the cache against a full pass of each; logits.
        ``packed_vs_single``: trajectories that share a prompt in one row against a row for each; log-probabilities.
        ``rollout_vs_replay``: tokens that differ between what the engine made of a written text and what the replay
            of written rationales makes of it.
        ``rollout_vs_learner``: the sampler's log-probabilities against the learner's, crops shown;
            ``ratio_error``: the same as ``|exp(difference) - 1|``.
        ``batch_vs_single``: 16 greedy trajectories together against one at a time; log-probabilities;
            ``batch_vs_single_tokens``: tokens that differ.
        ``box_round_trip``: written coordinates to original pixels and back, in units of the box space.
        ``prompt_ids_match``: ids that differ from those of the processor's own chat template.
        ``full_vs_processor``: the full pass of the prompt against the model's own forward of what the processor
            makes of question and scaled image; logits.
        ``control_crop_swapped``: logits behind the second crop if another one is in its place.
        ``control_positions_shifted``: logits behind the first image if all stand one position further.
        ``control_logit_std``: standard deviation of the logits.
    """
    backbone.eval()
    wide, tall = pattern(*LANDSCAPE, seed=0), pattern(*PORTRAIT, seed=1)
    questions = [
        *(question(f"wide-{crops}", wide, crops) for crops in range(4)),
        question("wide-other", wide, 1, QUESTIONS[1]),
        question("tall-2", tall, 2, QUESTIONS[1]),
        question("text", None, 0),
    ]
    written, skipped = Replayer(backbone)(questions)
    if skipped:
        raise ValueError(f"Expected rationales that {type(backbone).__name__} can write, but got: {skipped[0]}.")
    shared, ragged, text = written[:5], [*written[:4], written[5]], written[6]
    with torch.no_grad():
        results = {
            "full_vs_native": full_vs_native(backbone, written[2]),
            "full_vs_native_portrait": full_vs_native(backbone, written[5]),
            "full_vs_native_no_crops": full_vs_native(backbone, written[0]),
            "full_vs_native_text_only": full_vs_native(backbone, text),
            "incremental_vs_full": incremental_vs_full(backbone, ragged),
            "packed_vs_single": packed_vs_single(backbone, shared),
            **rollout_vs_learner(backbone, written[:6]),
            **batch_vs_single(backbone, [written[5], written[4], written[1], written[0]]),
            "box_round_trip": box_round_trip(backbone),
            "control_crop_swapped": control_crop_swapped(backbone, written[2]),
            "control_positions_shifted": control_positions_shifted(backbone, written[2]),
            "control_logit_std": float(full_logits(backbone, written[2]).std()),
        }
        if isinstance(backbone, HFVLMBackbone):
            results["prompt_ids_match"] = float(prompt_ids_match(backbone, written[2]))
            results["full_vs_processor"] = full_vs_processor(backbone, written[2])
    return results


def failures(results: Mapping[str, float], tolerance: float = TOLERANCE) -> list[str]:
    """One sentence for each figure that is not as it has to be."""
    found = []
    for name, value in results.items():
        is_control = name.startswith("control_")
        if is_control and not value >= CONTROL:
            found.append(f"{name} is {value:.3g}, which is too small for the other figures to mean anything.")
        elif not is_control and not value <= tolerance:
            found.append(f"{name} is {value:.3g}, but should be at most {tolerance:.3g}.")
    return found


def pattern(height: int, width: int, seed: int) -> Tensor:
    """An image (3, H, W) uint8 of coarse and fine random structure, every part of it unlike the others."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 5, 7, generator=generator)
    fine = torch.rand(1, 3, height, width, generator=generator)
    large = torch.nn.functional.interpolate(coarse, (height, width))
    return ((0.7 * large + 0.3 * fine)[0] * 255).to(torch.uint8)


def question(name: str, image: Tensor | None, crops: int, text: str = QUESTIONS[0]) -> Sample:
    """A question with a rationale that looks at so many regions."""
    height, width = image.shape[-2:] if image is not None else (1, 1)
    boxes = [(x1 * width, y1 * height, x2 * width, y2 * height) for x1, y1, x2, y2 in REGIONS[:crops]]
    looks = [Step(thought, Region(box)) for thought, box in zip(THOUGHTS, boxes, strict=False)]
    images = () if image is None else (image,)
    return Sample(name, text, images, answers=("42",), rationale=(*looks, Step(ANSWER)))


def full_logits(backbone: Backbone, trajectory: Trajectory, shift_from: int | None = None) -> Tensor:
    """(L, V) logits by the learner's pass; positions from ``shift_from`` on moved by one."""
    batch = collate(backbone, [trajectory])
    if shift_from is not None:
        late = torch.arange(batch.token_ids.shape[1], device=backbone.device) >= shift_from
        batch = replace(batch, position_ids=batch.position_ids + late)
    return backbone.head(backbone.hidden_states(batch)[0]).float().cpu()


def native_logits(backbone: Backbone, trajectory: Trajectory) -> Tensor:
    """(L, V) logits by the model's own forward, with its own positions and mask."""
    ids = token_ids(trajectory)
    if isinstance(backbone, HFVLMBackbone):
        return backbone.native_logits(ids, trajectory.visuals).float().cpu()
    assert isinstance(backbone, TimmLMBackbone)
    embeddings = backbone.embed(ids[None].to(backbone.device))
    features = backbone.encode(trajectory.visuals) if trajectory.visuals else []
    is_visual = (ids == backbone.image_token_id)[None].to(backbone.device)
    logits: Tensor = backbone.language(inputs_embeds=backbone.merge(embeddings, is_visual, features)).logits
    return logits[0].float().cpu()


def token_ids(trajectory: Trajectory) -> Tensor:
    """(L,) ids of prompt and completion."""
    return torch.cat([trajectory.prompt_ids, trajectory.completion_ids])


def largest(difference: Tensor) -> float:
    """The largest absolute value; NaN if there is one, 0 of nothing."""
    return float(difference.detach().abs().max()) if difference.numel() else 0.0


def full_vs_native(backbone: Backbone, trajectory: Trajectory) -> float:
    """See `measure`."""
    return largest(full_logits(backbone, trajectory) - native_logits(backbone, trajectory))


Chunk = tuple[Tensor, list[Visual]]  # ids (n,), and the visuals among them


def pieces(backbone: Backbone, trajectory: Trajectory) -> list[Chunk]:
    """A trajectory as the engine can feed it: the prompt, then single tokens and whole crops."""
    shown = len(trajectory.sample.images)
    found: list[Chunk] = [(trajectory.prompt_ids, list(trajectory.visuals[:shown]))]
    for turn in trajectory.turns:
        found += [(one, []) for one in trajectory.completion_ids[turn.start : turn.stop].split(1)]
        if turn.crop is not None:
            found.append((backbone.visual_ids(*turn.crop.pixels.shape[-2:]), [turn.crop]))
    return found


def incremental_vs_full(
    backbone: Backbone, trajectories: Sequence[Trajectory], sizes: Sequence[int] = (1, 3, 1, 7, 2)
) -> float:
    """See `measure`.

    Args:
        backbone: the one to be measured.
        trajectories: one row each.
        sizes: how many pieces a row takes at a time, each row another one, so that rows are ragged at every step.
    """
    expected = [full_logits(backbone, trajectory) for trajectory in trajectories]
    waiting = [pieces(backbone, trajectory) for trajectory in trajectories]
    cache, places, at = RaggedCache(), [0] * len(waiting), [0] * len(waiting)
    worst, step = 0.0, 0
    while any(waiting):
        chunks = []
        for b, row in enumerate(waiting):
            size = sizes[(step + b) % len(sizes)]
            chunks.append(joined(row[:size]))
            del row[:size]
        logits = extended(backbone, cache, chunks, places)
        for b, (ids, _) in enumerate(chunks):
            worst = max(worst, largest(logits[b, : len(ids)] - expected[b][at[b] : at[b] + len(ids)]))
            at[b] += len(ids)
        step += 1
    assert at == [len(row) for row in expected]
    return worst


def joined(parts: Sequence[Chunk]) -> Chunk:
    """Several pieces as one."""
    ids = torch.cat([ids for ids, _ in parts]) if parts else torch.zeros(0, dtype=torch.long)
    return ids, [visual for _, visuals in parts for visual in visuals]


def extended(backbone: Backbone, cache: RaggedCache, chunks: Sequence[Chunk], places: list[int]) -> Tensor:
    """Append a chunk to each row of the cache; ``places`` (where each row's next token stands) moves on.

    Returns:
        (B, n, V) logits, right-padded.
    """
    positions = []
    for b, (ids, visuals) in enumerate(chunks):
        place, places[b] = backbone.positions(ids, visuals, places[b])
        positions.append(place.T)
    counts = torch.tensor([len(ids) for ids, _ in chunks], device=backbone.device)
    padded = pad_sequence([ids for ids, _ in chunks], batch_first=True).to(backbone.device)
    real = torch.arange(padded.shape[1], device=backbone.device) < counts[:, None]
    is_visual = (padded == backbone.image_token_id) & real
    shown = [visual for _, visuals in chunks for visual in visuals]
    features = backbone.encode(shown) if shown else []
    embeddings = backbone.merge(backbone.embed(padded), is_visual, features)
    blocks = visual_blocks(is_visual) if backbone.bidirectional_visuals else None
    mask = cache.prepare(counts, padded.shape[1], blocks)
    axes = pad_sequence(positions, batch_first=True).permute(2, 0, 1).to(backbone.device)
    logits = backbone.head(backbone(embeddings, axes, mask, cache))
    cache.commit()
    return logits.float().cpu()


def packed_vs_single(backbone: Backbone, trajectories: Sequence[Trajectory]) -> float:
    """See `measure`; all of them have the same image."""
    batch = collate(backbone, trajectories, row_tokens=1_000_000)
    assert len(batch.token_ids) == 1, "the trajectories do not share a prompt"
    together, _ = token_log_probs(backbone, batch, chunk=64)
    alone = [token_log_probs(backbone, collate(backbone, [one]), chunk=64)[0] for one in trajectories]
    return largest(together - torch.cat(alone))


FREE = 3  # tokens that the policy writes by itself before it is told to end


def script(backbone: Backbone, trajectory: Trajectory, cut: int) -> list[int | None]:
    """What the policy wrote in it; the last ``cut`` tokens, if any, make place for some of its own and an end."""
    ids: list[int | None] = trajectory.completion_ids[trajectory.sampled].tolist()
    if cut == 0:
        return ids
    return [*ids[: max(len(ids) - cut, 0)], *[None] * FREE, min(backbone.eos_ids)]


def rollout_vs_learner(backbone: Backbone, trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """See `measure`: each trajectory as it was written, and again with an end of its own."""
    requests = [Request(trajectory.sample, 2 * k + own) for k, trajectory in enumerate(trajectories) for own in (0, 1)]
    scripts = {r.seed: script(backbone, trajectories[r.seed // 2], cut=2 * (r.seed % 2)) for r in requests}
    with told(scripts):
        rolled = LocalEngine().rollout(backbone, requests, Decoding(temperature=0.8))
    expected = [t.completion_ids for t in trajectories]
    replayed = sum(differing(a.completion_ids, b) for a, b in zip(rolled[::2], expected, strict=True))
    batch = collate(backbone, rolled)
    backbone.learn()
    log_probs, _ = token_log_probs(backbone, batch, chunk=64)
    backbone.eval()
    gap = log_probs - batch.log_probs
    return {
        "rollout_vs_replay": float(replayed),
        "rollout_vs_learner": largest(gap),
        "ratio_error": largest(gap.exp() - 1),
    }


def batch_vs_single(backbone: Backbone, trajectories: Sequence[Trajectory], count: int = 16) -> dict[str, float]:
    """See `measure`: beginnings of different length are written as told, then each goes on greedily.

    The last of the trajectories fills up the batch.
    """
    chosen = [trajectories[min(k, len(trajectories) - 1)] for k in range(count)]
    requests = [Request(trajectory.sample, k) for k, trajectory in enumerate(chosen)]
    cuts = [1 + max(k - len(trajectories) + 1, 0) for k in range(count)]
    scripts = {k: script(backbone, trajectory, cuts[k]) for k, trajectory in enumerate(chosen)}
    options = Decoding(temperature=0.0)
    with told(scripts):
        together = LocalEngine(max_batch=count).rollout(backbone, requests, options)
        alone = LocalEngine(max_batch=1).rollout(backbone, requests, options)
    pairs = list(zip(together, alone, strict=True))
    common = [min(len(a.log_probs), len(b.log_probs)) for a, b in pairs]
    gaps = [a.log_probs[:n] - b.log_probs[:n] for (a, b), n in zip(pairs, common, strict=True)]
    return {
        "batch_vs_single": largest(torch.cat(gaps)),
        "batch_vs_single_tokens": float(sum(differing(a.completion_ids, b.completion_ids) for a, b in pairs)),
    }


def differing(a: Tensor, b: Tensor) -> int:
    """In how many places two sequences of ids differ; what only one of them has differs."""
    n = min(len(a), len(b))
    return int((a[:n] != b[:n]).sum()) + max(len(a), len(b)) - n


def box_round_trip(backbone: Backbone) -> float:
    """See `measure`: text, the environment's region in original pixels, and the text that asks for that region."""
    return max(round_trip(backbone, size, box) for size in SIZES for box in REGIONS)


def round_trip(backbone: Backbone, size: tuple[int, int], share: Box) -> float:
    """Largest change of a coordinate, in units of the box space.

    Args:
        backbone: the one that writes.
        size: (height, width) of the original image.
        share: the box, 0 to 1.
    """
    image = torch.zeros(3, *size, dtype=torch.uint8)
    sample, visuals = Sample("round trip", "", (image,)), tuple(backbone.see([image]))
    whole = {"pixels": size, "resized": tuple(visuals[0].pixels.shape[-2:]), "unit": (1, 1), "thousand": (1000, 1000)}
    height, width = whole[backbone.box_space.kind]
    exact = (share[0] * width, share[1] * height, share[2] * width, share[3] * height)
    bins = [round(c / backbone.bin_size) for c in exact]
    coords = [round(k * backbone.bin_size, 6) for k in bins]
    reply = respond(format_box(coords), sample, visuals, backbone.box_space)
    if not isinstance(reply, Look):
        raise ValueError(f"Expected {coords} to be a valid box on an image of {size}, but got {reply}.")
    again = parse_turn(backbone.detokenize(backbone.write("", reply.region, sample, visuals)[0]))
    assert isinstance(again, BoxRequest)
    return max(abs(a - b) for a, b in zip(coords, again.coords, strict=True))


def prompt_ids_match(backbone: HFVLMBackbone, trajectory: Trajectory) -> int:
    """See `measure`; image and text go through the processor's chat template in one go."""
    sample, visual = trajectory.sample, trajectory.visuals[0]
    messages = conversation(backbone, sample, {"image": (visual.pixels * 255).round().to(torch.uint8).cpu()})
    inputs = backbone.processor.apply_chat_template(
        messages, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    return differing(backbone.prompt_ids(sample, [visual]), inputs["input_ids"][0])


def full_vs_processor(backbone: HFVLMBackbone, trajectory: Trajectory) -> float:
    """See `measure`; an image in [0, 1], for a processor would round a resized one of whole numbers."""
    visual, nothing = trajectory.visuals[0], torch.zeros(0)
    text = backbone.processor.apply_chat_template(
        conversation(backbone, trajectory.sample, {}), tokenize=False, add_generation_prompt=True
    )
    inputs = backbone.processor(text=[text], images=[[visual.pixels.cpu()]], do_rescale=False, return_tensors="pt")
    expected = backbone.model(**inputs.to(backbone.device), use_cache=False).logits[0].float().cpu()
    prompt = replace(
        trajectory,
        completion_ids=nothing.long(),
        sampled=nothing.bool(),
        log_probs=nothing,
        coordinates=nothing,
        visuals=(visual,),
        turns=(),
    )
    return largest(full_logits(backbone, prompt) - expected)


def conversation(backbone: HFVLMBackbone, sample: Sample, image: dict[str, Tensor]) -> list[dict[str, object]]:
    """The question about one image as chat templates take it."""
    text = {"type": "text", "text": sample.question + backbone.instruction}
    return [{"role": "user", "content": [{"type": "image", **image}, text]}]


def control_crop_swapped(backbone: Backbone, trajectory: Trajectory) -> float:
    """See `measure`; the other crop is the negative."""
    image, first, second = trajectory.visuals
    other = Visual(1 - second.pixels, second.tokens, second.role)
    swapped = replace(trajectory, visuals=(image, first, other))
    behind = _end_of_visual(backbone, trajectory, 2)
    return largest((full_logits(backbone, trajectory) - full_logits(backbone, swapped))[behind:])


def control_positions_shifted(backbone: Backbone, trajectory: Trajectory) -> float:
    """See `measure`."""
    behind = _end_of_visual(backbone, trajectory, 0)
    return largest((full_logits(backbone, trajectory) - full_logits(backbone, trajectory, behind))[behind:])


def _end_of_visual(backbone: Backbone, trajectory: Trajectory, index: int) -> int:
    """Where the first token behind the placeholders of a visual stands."""
    places = (token_ids(trajectory) == backbone.image_token_id).nonzero()[:, 0]
    return int(places[sum(visual.tokens for visual in trajectory.visuals[: index + 1]) - 1]) + 1


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 1 if a figure is not as it has to be, 2 if there is no such backbone."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.parity", description=__doc__)
    parser.add_argument("--backbone", required=True, help=f"{', '.join(NAMES)}, a folder or a hub name")
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, help="largest difference allowed")
    parser.add_argument("--json", action="store_true", help="one flat object on stdout, nothing else")
    options = parser.parse_args(arguments)
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        try:
            backbone = backbone_of(options.backbone, Path(folder))
        except (ValueError, OSError) as error:
            print(error, file=sys.stderr)
            return 2
        results = measure(backbone)
    wrong = failures(results, options.tolerance)
    if options.json:
        print(json.dumps(results))
    else:
        for name, value in results.items():
            print(f"{name:30s} {value:.3g}")
    for sentence in wrong:
        print(sentence, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
