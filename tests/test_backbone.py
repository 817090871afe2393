"""An incremental pass over ragged rows equals one full pass; packed rows equal rows of their own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from modules.backbones import base
from modules.backbones.base import packed_mask, row_runs
from modules.backbones.cache import RaggedCache
from modules.backbones.fragments import FragmentVocabulary, fragment_tokenizer
from modules.backbones.projectors import ProjectorConfig
from modules.backbones.scaling import ScalerConfig
from modules.backbones.timm_lm import (
    LanguageConfig,
    TimmLMBackbone,
    TokenizerConfig,
    VisionConfig,
    sincos_2d,
)
from modules.environment import OF_ZOOM, REFUSALS
from modules.functional.packing import common_length
from modules.replay import Replayer
from modules.scoring import collate, token_log_probs
from modules.trajectory import Region, Sample, Trajectory, Visual
from tests.conftest import FRAGMENTS, make_backbone, make_samples


def sequences(backbone: TimmLMBackbone) -> list[tuple[Tensor, list[Visual]]]:
    """Four ragged sequences with 0 to 3 crops of different sizes."""
    image = make_samples(1)[0].images[0]
    text = backbone.tokenize("<think>I zoom in on redblue73green")
    rows = []
    for crops in range(4):
        regions = [Region((0.0, 0.0, 16.0 + 8 * k, 16.0)) for k in range(crops)]
        visuals = [*backbone.see([image]), *backbone.look([image] * crops, regions)]
        ids = [backbone.visual_ids(*visuals[0].pixels.shape[-2:]), text[: 3 + crops]]
        for visual in visuals[1:]:
            ids += [backbone.visual_ids(*visual.pixels.shape[-2:]), text[crops:]]
        rows.append((torch.cat(ids), visuals))
    return rows


def full_logits(backbone: TimmLMBackbone, ids: Tensor, visuals: list[Visual]) -> Tensor:
    """The plain full pass, with the language model's own causal mask and positions."""
    embeddings = backbone.embed(ids[None])
    embeddings = backbone.merge(embeddings, (ids == backbone.image_token_id)[None], backbone.encode(visuals))
    return backbone.language(inputs_embeds=embeddings).logits[0]


@pytest.mark.parametrize("chunks", [[5, 1, 1, 9, 2], [1] * 12, [30], [4, 20, 3]])
def test_incremental_ragged_pass_equals_full_pass(chunks: list[int]) -> None:
    backbone = make_backbone(crop=ScalerConfig(min_pixels=64, max_pixels=64 * 64))
    rows = sequences(backbone)
    expected = [full_logits(backbone, *row).detach() for row in rows]
    assert len({len(ids) for ids, _ in rows}) == 4
    assert torch.cat(expected).std() >= 1
    features = [torch.cat(backbone.encode(visuals)) for _, visuals in rows]
    cache, at, seen = RaggedCache(), [0] * 4, [0] * 4
    largest = 0.0
    for step in range(100):
        # each row takes another chunk length, so that rows are ragged at every step
        counts = [min(chunks[(step + b) % len(chunks)], len(ids) - at[b]) for b, (ids, _) in enumerate(rows)]
        if not any(counts):
            break
        width = max(counts)
        ids = torch.stack(
            [
                torch.nn.functional.pad(r[at[b] : at[b] + n], (0, width - n))
                for b, ((r, _), n) in enumerate(zip(rows, counts, strict=True))
            ]
        )
        real = torch.arange(width) < torch.tensor(counts)[:, None]
        is_visual = (ids == backbone.image_token_id) & real
        taken = is_visual.sum(1).tolist()
        part = [features[b][seen[b] : seen[b] + n] for b, n in enumerate(taken)]
        embeddings = backbone.merge(backbone.embed(ids), is_visual, part)
        positions = torch.tensor(at)[:, None] + torch.arange(width)
        mask = cache.prepare(torch.tensor(counts), width)
        with torch.no_grad():
            logits = backbone.head(backbone(embeddings, positions[None], mask, cache))
        cache.commit()
        for b, n in enumerate(counts):
            largest = max(
                largest, float((logits[b, :n].detach() - expected[b][at[b] : at[b] + n]).abs().max()) if n else 0.0
            )
            at[b] += n
            seen[b] += taken[b]
    assert at == [len(ids) for ids, _ in rows]
    assert largest < 1e-5


def test_controls_the_parity_test_would_notice() -> None:
    backbone = make_backbone(crop=ScalerConfig(min_pixels=64, max_pixels=64 * 64))
    ids, visuals = sequences(backbone)[3]
    right = full_logits(backbone, ids, visuals)
    swapped = full_logits(
        backbone, ids, [visuals[0], Visual(1 - visuals[1].pixels, visuals[1].tokens, "crop"), *visuals[2:]]
    )
    assert (right - swapped).abs().max() > 0.1
    embeddings = backbone.merge(
        backbone.embed(ids[None]), (ids == backbone.image_token_id)[None], backbone.encode(visuals)
    )
    late = torch.arange(len(ids)) + (torch.arange(len(ids)) >= 10)
    shifted = backbone.language(inputs_embeds=embeddings, position_ids=late[None]).logits[0]
    assert (right - shifted).abs().max() > 0.1


def test_a_finished_row_leaves_the_cache_and_repeats_share_a_prompt() -> None:
    cache = RaggedCache()
    keys = torch.arange(2.0)[:, None, None, None].expand(2, 1, 3, 1)
    cache.prepare(torch.tensor([3, 2]), 3)
    cache.update(keys, keys, 0)
    cache.commit()
    cache.select(torch.tensor([1, 1, 0]))
    assert cache.lengths.tolist() == [2, 2, 3]
    mask = cache.prepare(torch.tensor([1, 1, 1]), 1)
    new = torch.full((3, 1, 1, 1), 9.0)
    held, _ = cache.update(new, new, 0)
    assert mask[:, 0, 0].tolist() == [[True, True, True, False], [True, True, True, False], [True] * 4]
    assert held[..., 0].squeeze(1).tolist() == [[1, 1, 9, 0], [1, 1, 9, 0], [0, 0, 0, 9]]


def trajectories(backbone: TimmLMBackbone) -> list[Trajectory]:
    """Two groups: four trajectories about one image, two questions each; and one about another."""
    base = make_samples(3)
    shared = [Sample(**{**vars(s), "images": base[0].images}) for s in base]
    made, skipped = Replayer(backbone)([*shared, *make_samples(2, seed=5)])
    assert not skipped
    return made


def test_shared_prefix_rows_equal_separate_rows_in_values_and_gradients() -> None:
    backbone = make_backbone()
    made = trajectories(backbone)
    packed = collate(backbone, made)
    assert packed.token_ids.shape[0] == 3  # the three about one image share a row
    assert len(packed.visuals) == 3 + 5  # images once, crops
    results = []
    for batches in ([packed], [collate(backbone, [t]) for t in made]):
        backbone.zero_grad()
        parts = [token_log_probs(backbone, batch, chunk=7)[0] for batch in batches]
        torch.cat(parts).sum().backward()
        results.append(
            (torch.cat(parts).detach(), [p.grad.clone() for p in backbone.parameters() if p.grad is not None])
        )
    (together, gradients), (alone, expected) = results
    assert (together - alone).abs().max() < 1e-5
    assert len(gradients) == len(expected) > 20
    for a, b in zip(gradients, expected, strict=True):
        assert (a - b).abs().max() <= 1e-4 * max(1.0, float(b.abs().max()))


def test_rows_in_runs_of_their_length_equal_rows_together(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = make_backbone()
    batch = collate(backbone, trajectories(backbone))
    assert (batch.segment_ids < 0).any()
    results = []
    for positions in (10_000, 1):
        monkeypatch.setattr(base, "RUN", positions)
        monkeypatch.setattr(base, "BUSY", 1)
        monkeypatch.setattr(base, "PADDING", 1.0)
        backbone.zero_grad()
        found = token_log_probs(backbone, batch, chunk=1000)[0]
        found.sum().backward()
        gradients = [p.grad.clone() for p in backbone.parameters() if p.grad is not None]
        results.append((found.detach(), gradients, len(row_runs(batch.segment_ids))))
    (together, expected, one), (apart, gradients, many) = results
    assert (one, many) == (1, 2)  # of three rows, two are equally long
    assert (together - apart).abs().max() < 1e-5
    assert len(gradients) == len(expected) > 20
    for a, b in zip(gradients, expected, strict=True):
        assert (a - b).abs().max() <= 1e-4 * max(1.0, float(b.abs().max()))


def test_runs_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = torch.tensor([3, 9, 1, 8, 2])
    segments = torch.where(torch.arange(9) < lengths[:, None], 0, -1)
    monkeypatch.setattr(base, "RUN", 12)
    monkeypatch.setattr(base, "PADDING", 1.2)
    found = {}
    for busy in (1, 10):
        monkeypatch.setattr(base, "BUSY", busy)
        found[busy] = [(rows.tolist(), length) for rows, length in row_runs(segments)]
    # 18 positions for 17 tokens, 27 for 20 would be too many; 6 for 5, 9 for 6 would be; below 10 it does not matter
    assert found == {1: [([1, 3], 9), ([0, 4], 3), ([2], 1)], 10: [([1, 3], 9), ([0, 4, 2], 3)]}
    monkeypatch.setattr(base, "RUN", 45)  # as many positions as there are
    assert [rows.tolist() for rows, _ in row_runs(segments)] == [[0, 1, 2, 3, 4]]
    monkeypatch.setattr(base, "RUN", 12)
    monkeypatch.setattr(base, "PADDING", 2.0)  # 45 positions for 23 tokens are less
    assert [rows.tolist() for rows, _ in row_runs(segments)] == [[0, 1, 2, 3, 4]]


def test_packed_mask_hides_other_completions_and_padding_from_the_rest() -> None:
    mask = packed_mask(torch.tensor([[0, 0, 1, 1, 2, -1]]))[0, 0].int().tolist()
    assert mask == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [1, 1, 0, 0, 0, 1],
    ]


def test_common_length() -> None:
    rows = [torch.tensor(x) for x in ([1, 2, 3], [1, 2, 4, 5], [1, 2])]
    assert common_length(rows) == 2
    assert common_length(rows[:1]) == 3
    assert common_length([torch.tensor([1]), torch.tensor([2])]) == 0


def test_box_round_trip_and_exact_coordinates() -> None:
    backbone = make_backbone()
    sample = make_samples(1)[0]
    visuals = backbone.see(sample.images)
    ids, coordinates = backbone.write("red ", Region((5.0, 8.0, 30.0, 61.0)), sample, visuals)
    assert backbone.detokenize(ids) == 'red {"bbox_2d": [4, 8, 32, 60]}'  # bins of 4 pixels
    assert backbone.detokenize(ids.tolist()) == backbone.detokenize(ids)
    assert coordinates.isfinite().tolist() == [False, True, True, True, True]
    assert coordinates[1:].tolist() == [1.25, 2.0, 7.5, 15.25]


def test_fragment_tokenizer_round_trips_and_rejects_repeats() -> None:
    tokenizer = fragment_tokenizer(FragmentVocabulary(FRAGMENTS, coordinates=17, step=4))
    text = '<think>I zoom in on red {"bbox_2d": [4, 8, 44, 4]}I can read it now.</think><answer>4</answer>'
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == 2 + 4 + 3
    assert tokenizer.decode(ids) == text
    assert tokenizer.unk_token_id not in ids
    with pytest.raises(ValueError, match="distinct"):
        fragment_tokenizer(FragmentVocabulary(["a", "a"]))


def test_words_for_a_zoom_come_only_when_they_are_asked_for() -> None:
    """The quickstart's vocabulary, and with it its weights, are what they were."""
    plain = fragment_tokenizer(FragmentVocabulary(FRAGMENTS, coordinates=17, step=4))
    assert len(plain) == 4 + len(FRAGMENTS) + 2 * 17 + len({*REFUSALS.values()}) - len(OF_ZOOM)
    assert not any("zoom" in word.lower() and word not in FRAGMENTS for word in plain.get_vocab())
    vocabulary = FragmentVocabulary(FRAGMENTS, coordinates=17, step=4, zooms=[1, 2.5])
    tokenizer = fragment_tokenizer(vocabulary)
    text = 'red {"bbox_2d": [4, 8, 44, 4], "zoom": 2.5}'
    ids = tokenizer(text)["input_ids"]
    assert (len(ids), tokenizer.decode(ids)) == (6, text)
    assert [len(tokenizer(REFUSALS[fault])["input_ids"]) for fault in OF_ZOOM] == [1, 1]
    assert len(vocabulary.coordinate_tokens()) == 3


@pytest.mark.parametrize(
    ("name", "size", "tokens"),
    [
        ("resnet10t", 64, 4),
        ("convnext_atto", 64, 4),
        ("swin_tiny_patch4_window7_224", 64, 4),
        ("vit_tiny_patch16_224", 32, 4),
    ],
)
def test_any_timm_encoder_gives_one_token_a_patch(name: str, size: int, tokens: int) -> None:
    options = {} if name in ("resnet10t", "convnext_atto") else {"img_size": size}
    backbone = TimmLMBackbone(
        VisionConfig(name, options=options),
        LanguageConfig(
            config={
                "model_type": "llama",
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
            }
        ),
        TokenizerConfig(vocabulary=FragmentVocabulary(FRAGMENTS)),
        ScalerConfig(size=(size, size)),
        ScalerConfig(size=(size, size)),
        projector=ProjectorConfig("mlp"),
    ).eval()
    (visual,) = backbone.see([make_samples(1)[0].images[0]])
    (features,) = backbone.encode([visual])
    assert features.shape == (tokens, 16)
    assert visual.tokens == tokens
    # row-major order: changing the top right quarter of the image moves token 1 most
    changed = visual.pixels.clone()
    changed[:, : size // 2, size // 2 :] = 0
    (other,) = backbone.encode([Visual(changed, tokens, "image")])
    assert int((features - other).abs().sum(-1).argmax()) == 1


def test_sincos_positions_are_distinct_and_relative() -> None:
    grid = sincos_2d(4, 4, 32)
    assert grid.shape == (16, 32)
    assert torch.cdist(grid, grid).add(torch.eye(16) * 9).min() > 0.5
    # the middle of a 1 x 1 grid and of a 3 x 3 grid are the same place
    assert torch.allclose(sincos_2d(1, 1, 32)[0], sincos_2d(3, 3, 32)[4], atol=1e-5)


@pytest.mark.parametrize("given", [{}, {"name": "x", "config": {"model_type": "qwen2"}}])
def test_language_model_is_either_pretrained_or_random(given: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="exactly one"):
        LanguageConfig(**given)  # type: ignore[arg-type]


def test_a_language_model_and_its_tokenizer_are_loaded_from_a_folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = str(tmp_path_factory.mktemp("lm"))
    source = make_backbone()
    source.language.save_pretrained(folder)
    source.tokenizer.save_pretrained(folder)
    loaded = TimmLMBackbone(
        VisionConfig("vit_tiny_patch16_224", options={"img_size": 32}),
        LanguageConfig(name=folder),
        TokenizerConfig(folder),
        ScalerConfig(size=(32, 32)),
        ScalerConfig(size=(32, 32)),
    )
    for (name, a), b in zip(source.language.named_parameters(), loaded.language.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert loaded.image_token_id == source.image_token_id
    assert bool(loaded.banned[loaded.image_token_id])
