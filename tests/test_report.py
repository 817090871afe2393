"""Intervals against independent computations; files and tables."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from commands.report import Prediction, Report, ReportError, Row, build, difference_ci95, mean_ci95, table


def write(folder: Path, lines: list[dict[str, Any]], name: str = "predictions.jsonl") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))


def line(k: int, correct: int, mode: str = "greedy", iou: float | None = None, crops: int = 0) -> dict[str, Any]:
    return {"id": f"q{k}", "image_id": f"i{k // 2}", "mode": mode, "correct": correct, "iou": iou, "crops": crops}


def prediction(k: int, correct: float, image: str | None = None) -> Prediction:
    return Prediction(f"q{k}", image or f"i{k}", correct, None, 0)


def correlated(clusters: int) -> tuple[np.ndarray, np.ndarray]:
    """0/1 values whose clusters have a probability of their own, and the cluster of each."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 8, clusters)
    names = np.repeat(np.arange(clusters), sizes)
    return (rng.random(len(names)) < rng.beta(0.5, 0.5, clusters)[names]).astype(float), names


def test_with_clusters_of_one_it_is_the_binomial_interval() -> None:
    values = [1.0] * 30 + [0.0] * 20
    interval = mean_ci95(values, [str(k) for k in range(50)])
    half = stats.t.ppf(0.975, 49) * math.sqrt(0.6 * 0.4 / 49)
    assert interval == pytest.approx((0.6 - half, 0.6 + half))


def test_the_spread_is_that_of_a_bootstrap_over_clusters() -> None:
    values, names = correlated(150)
    interval = mean_ci95(values.tolist(), [str(name) for name in names])
    assert interval is not None
    error = (interval[1] - interval[0]) / 2 / stats.t.ppf(0.975, 149)
    rng = np.random.default_rng(1)
    sums = np.bincount(names, values)
    sizes = np.bincount(names)
    drawn = rng.integers(0, 150, (4000, 150))
    bootstrap = (sums[drawn].sum(1) / sizes[drawn].sum(1)).std()
    assert error == pytest.approx(bootstrap, rel=0.06)
    independent = values.std(ddof=1) / math.sqrt(len(values))
    assert error > 1.4 * independent  # so the two could be told apart


def test_repeating_every_answer_teaches_nothing() -> None:
    values, names = correlated(20)
    clusters = [str(name) for name in names]
    assert mean_ci95([*values] * 3, clusters * 3) == pytest.approx(mean_ci95(list(values), clusters))


def test_one_cluster_gives_no_interval() -> None:
    assert mean_ci95([1.0, 0.0], ["a", "a"]) is None
    assert mean_ci95([], []) is None


def test_a_difference_is_paired() -> None:
    rng = np.random.default_rng(2)
    a = rng.integers(0, 2, 80).astype(float)
    b = np.where(rng.random(80) < 0.1, 1 - a, a)  # the same questions are hard for both
    interval = difference_ci95(
        "x", [prediction(k, v) for k, v in enumerate(a)], [prediction(k, v) for k, v in reversed(list(enumerate(b)))]
    )
    test = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert interval == pytest.approx([test.low, test.high])
    unpaired = stats.t.ppf(0.975, 79) * math.sqrt((statistics.variance(a) + statistics.variance(b)) / 80)
    assert interval is not None
    assert (interval[1] - interval[0]) / 2 < 0.6 * unpaired


def test_a_difference_is_clustered_by_image() -> None:
    a = [prediction(k, float(k % 8 < 6), f"i{k // 4}") for k in range(80)]
    b = [prediction(k, float(k % 8 < 3), f"i{k // 4}") for k in range(80)]
    # images alternate between differences (0, 0, 0, 1) and (1, 1, 0, 0): sums 1 and 2 around 4 * 0.375,
    # residuals -0.5 and +0.5: V = 20 / 19 * (20 * 0.25) / 80^2
    half = stats.t.ppf(0.975, 19) * math.sqrt(20 / 19 * 5 / 6400)
    assert difference_ci95("x", a, b) == pytest.approx([0.375 - half, 0.375 + half])


def test_questions_that_do_not_pair_up_are_named() -> None:
    a, b = [prediction(k, 1.0) for k in range(3)], [prediction(k, 1.0) for k in range(4)]
    with pytest.raises(ReportError, match=r"'a_minus_b'.*1 are in one of them alone, 'q3' first"):
        difference_ci95("a_minus_b", a, b)
    with pytest.raises(ReportError, match=r"'q2'.*'i2' and 'other'"):
        difference_ci95("x", a, [*b[:2], prediction(2, 1.0, "other")])


def test_the_numbers_of_a_row(tmp_path: Path) -> None:
    greedy = [line(0, 1, iou=0.5, crops=1), line(1, 1, iou=0.25, crops=2), line(2, 0, iou=0.0), line(3, 1)]
    write(tmp_path / "t", greedy + [line(k, int(k == 0), "sampled") for k in range(4)])
    for name, seconds in (("a", 1.5), ("b", 2.0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "fit.json").write_text(json.dumps({"seconds": seconds, "steps": 3}))
    report = Report(rows={"x": Row("t", sampled_mode="sampled", seconds_from=["a", "b"]), "y": Row("t", "sampled")})
    results = build(report, tmp_path)
    interval = results["x"].pop("accuracy_ci95")
    assert results["x"] == {
        "accuracy": 0.75,
        "sampled_accuracy": 0.25,
        "mean_iou": 0.25,  # of the three questions that have a region
        "zoom_rate": 0.5,
        "n": 4,
        "seconds": 3.5,
    }
    assert interval == [0.0, 1.0]  # two images: t(1) is 12.7, and an accuracy ends at 0 and 1
    assert results["y"]["accuracy"] == 0.25
    assert results["y"]["sampled_accuracy"] is results["y"]["mean_iou"] is results["y"]["seconds"] is None


def test_a_row_is_broken_down_by_a_key_of_the_predictions(tmp_path: Path) -> None:
    kinds = ["far", "far", "near", "near"]
    greedy = [
        line(k, int(k != 1), iou=0.5 if k < 2 else None, crops=int(k < 2)) | {"source": kinds[k]} for k in range(4)
    ]
    sampled = [line(k, int(k == 3), "sampled") | {"source": kinds[k]} for k in range(4)]
    write(tmp_path / "t", greedy + sampled)
    report = Report(rows={"x": Row("t", sampled_mode="sampled")}, by="source")
    results = build(report, tmp_path)
    parts = results["x"]["by"]
    keys = ("accuracy", "zoom_rate", "sampled_accuracy", "mean_iou", "n")
    assert {name: tuple(part[key] for key in keys) for name, part in parts.items()} == {
        "far": (0.5, 1.0, 0.0, 0.5, 2),
        "near": (1.0, 0.0, 0.5, None, 2),
    }
    assert results["x"]["accuracy"] == 0.75  # the whole stands beside its parts
    assert [each.split()[:3] for each in table(report, results).splitlines()[1:]] == [
        ["x", "0.750", "[0.000,"],
        ["x:", "far", "0.500"],
        ["x:", "near", "1.000"],
    ]
    with pytest.raises(ReportError, match=r"predictions.jsonl:1: lacks kind, by which"):
        build(Report(rows={"x": Row("t")}, by="kind"), tmp_path)


def test_ranks_are_put_together(tmp_path: Path) -> None:
    write(tmp_path / "t", [line(0, 1)], "predictions.0.jsonl")
    write(tmp_path / "t", [line(1, 0)], "predictions.1.jsonl")
    assert build(Report(rows={"x": Row("t")}), tmp_path)["x"]["n"] == 2


def test_failed_judgements_are_left_out(tmp_path: Path) -> None:
    unjudged = {key: value for key, value in line(1, 0).items() if key != "correct"}
    write(tmp_path / "t", [line(0, 1), unjudged])
    results = build(Report(rows={"x": Row("t")}), tmp_path)
    assert (results["x"]["n"], results["x"]["accuracy"]) == (1, 1.0)


BROKEN = {
    "there twice": ([line(0, 1), line(0, 1)], r"predictions.jsonl:2: question 'q0' is there twice in mode 'greedy'"),
    "lacks": ([{"id": "q0", "mode": "greedy"}], r"predictions.jsonl:1: lacks image_id, iou, crops"),
    "correct": ([line(0, 2)], r"predictions.jsonl:1: expected `correct` to be 0 or 1, but got 2"),
    "mode": ([line(0, 1, "blank")], r"mode 'greedy' in .*t, but found \['blank'\]"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_named(name: str, tmp_path: Path) -> None:
    lines, message = BROKEN[name]
    write(tmp_path / "t", lines)
    with pytest.raises(ReportError, match=message):
        build(Report(rows={"x": Row("t")}), tmp_path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match=r"t/predictions.jsonl"):
        build(Report(rows={"x": Row("t")}), tmp_path)
    write(tmp_path / "t", [line(0, 1)])
    with pytest.raises(ReportError, match=r"sft/fit.json"):
        build(Report(rows={"x": Row("t", seconds_from=["sft"])}), tmp_path)
    (tmp_path / "t" / "predictions.jsonl").write_text("{\n")
    with pytest.raises(ReportError, match=r"predictions.jsonl:1: not valid JSON"):
        build(Report(rows={"x": Row("t")}), tmp_path)


def test_the_table_is_aligned_and_has_the_intervals(tmp_path: Path) -> None:
    write(tmp_path / "a", [line(k, int(k % 3 > 0)) for k in range(40)])
    write(tmp_path / "b", [line(k, int(k % 2 > 0), iou=0.5) for k in range(40)])
    report = Report(rows={"long_name": Row("a"), "b": Row("b")}, compare={"b_minus_a": ("b", "long_name")})
    results = build(report, tmp_path)
    assert set(results) == {"long_name", "b", "b_minus_a"}
    head, first, second, comparison = table(report, results).splitlines()
    low, high = results["long_name"]["accuracy_ci95"]
    assert f"0.650    [{low:.3f}, {high:.3f}]" in first
    end = head.index("95% interval") + len("95% interval")
    rights = {each.index("]") for each in (first, second, comparison)}
    assert len(rights) == 1
    assert rights.pop() == end - 1
    assert head.index("mean IoU") + len("mean IoU") == second.index("0.500", end) + len("0.500")
    low, high = results["b_minus_a"]
    assert comparison.split()[:2] == ["b_minus_a", "-0.150"]
    assert f"[{low:+.3f}, {high:+.3f}]" in comparison
