"""The table of `make bench`: its arithmetic, what is not run, and that each comparison compares what it says."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import run
from benchmarks.alternating import Alternating
from benchmarks.authors import SCRIPT, against_authors, followers
from benchmarks.elsewhere import Elsewhere
from benchmarks.large import Size, decode_step, lora_step
from benchmarks.quickstart import CROP, PlainLoop, Policy, against_plain_loop
from benchmarks.table import Row, interleaved, markdown, ratio, threads
from tests.taking_turns import counting, dying


def row(value: float = 2.0, target: float = 1.0, at_most: bool = False, name: str = "a / b") -> Row:
    return Row(name, value, target, at_most, (value - 0.5, value + 0.5))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Time stands still until it is told to go on."""
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    def advance(seconds: float) -> None:
        now[0] += seconds

    return advance


def test_sides_take_turns_and_the_order_changes(clock: Callable[[float], None]) -> None:
    called: list[str] = []

    def side(name: str, seconds: float) -> Callable[[], None]:
        def work() -> None:
            called.append(name)
            clock(seconds * len(called))  # later is slower: rounds can be told apart

        return work

    times = interleaved({"a": side("a", 1.0), "b": side("b", 10.0)}, repeats=3, warm_up=1)
    assert called == ["b", "a", "a", "b", "b", "a", "a", "b"]
    assert times == {"a": [3.0, 6.0, 7.0], "b": [40.0, 50.0, 80.0]}  # the warm-up's 2 and 10 are not there


def test_no_rounds_are_refused() -> None:
    with pytest.raises(ValueError, match="`repeats` to be at least 1, but got 0"):
        interleaved({"a": lambda: None}, repeats=0)


def test_ratios_are_taken_round_by_round() -> None:
    # a machine that is ten times as slow in one round
    assert ratio([2.0, 20.0, 6.0], [1.0, 10.0, 3.0]) == (2.0, (2.0, 2.0))
    assert ratio([1.0, 8.0, 9.0], [1.0, 2.0, 3.0]) == (3.0, (1.0, 4.0))  # ratio of the medians: 4


@pytest.mark.parametrize(("above", "below"), [([1.0], [1.0, 2.0]), ([], []), ([0.0], [1.0]), ([1.0], [-1.0])])
def test_what_is_no_ratio_is_refused(above: list[float], below: list[float]) -> None:
    with pytest.raises(ValueError, match="Expected"):
        ratio(above, below)


def test_targets_are_bounds_from_either_side() -> None:
    assert row(2.0, 1.0, at_most=False).met
    assert not row(2.0, 1.0, at_most=True).met
    assert row(1.0, 1.0, at_most=True).met
    assert row(1.0, 1.0, at_most=False).met


def test_a_row_without_a_number_is_refused() -> None:
    with pytest.raises(ValueError, match="'a / b' to be finite"):
        row(float("nan"))
    with pytest.raises(ValueError, match="lie in its spread"):
        Row("a / b", 3.0, 1.0, True, (1.0, 2.0))


def test_the_table_says_what_is_missed_and_what_was_not_run() -> None:
    text = markdown(
        [row(), row(1.0, 0.5, True, "c / d"), Row("e / f", 1.0, 1.02, True, (1.0, 1.0))], {"g / h": "no GPU"}
    )
    lines = text.splitlines()
    assert lines[2] == "| a / b | 2.00 | 1.50 - 2.50 | ≥ 1.000 | yes |"
    assert lines[3].endswith("| ≤ 0.500 | NO |")
    assert lines[4] == "| e / f | 1.000 | counted | ≤ 1.020 | yes |"
    assert lines[5] == "| g / h | not run: no GPU | | | |"


def test_threads_are_as_before_afterwards() -> None:
    before = torch.get_num_threads()
    with threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


def test_a_run_and_the_other_side_are_timed_apart(clock: Callable[[float], None]) -> None:
    callback = Alternating(lambda: clock(5.0), warm_up=1, together=2)
    for ours in (100.0, 1.0, 2.0, 3.0, 4.0, 50.0):  # the first warms up, the last has none to be taken together with
        callback.on_train_batch_start()
        clock(ours)
    callback.on_train_end()
    assert callback.seconds == {"ours": [1.5, 3.5], "other": [5.0, 5.0]}


def test_the_other_side_takes_a_turn_when_it_is_asked_to() -> None:
    with Elsewhere(counting, 5, 2) as other:
        assert [other.step(), other.step()] == [5, 6]
        with pytest.raises(RuntimeError, match=r"(?s)counting to take its turn, but it failed.*no more numbers"):
            other.step()
    assert not multiprocessing.active_children()


def test_an_other_side_that_dies_is_not_waited_for() -> None:
    with (
        Elsewhere(dying) as other,
        pytest.raises(RuntimeError, match="dying to take its turn, but it ended with 7"),
    ):
        other.step()


def test_an_other_side_that_has_died_is_not_asked() -> None:
    with Elsewhere(counting, 5, 2) as other:
        (process,) = multiprocessing.active_children()
        process.kill()
        process.join()
        with pytest.raises(RuntimeError, match="counting to take its turn, but it ended with -9"):
            other.step()


@pytest.fixture
def two_rows(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def fail() -> Row:
        raise RuntimeError("no memory")

    monkeypatch.setattr(run, "known_rows", lambda: {"good": row, "good too": row, "bad": fail})
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_rows")
def test_a_row_that_fails_does_not_cost_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "deep" / "bench.json"
    assert run.main(["--output", str(file), "--threads", "1"]) == 1
    told = json.loads(file.read_text())
    assert [r["id"] for r in told["rows"]] == ["good", "good too"]
    assert (told["rows"][0]["value"], told["rows"][0]["met"]) == (2.0, True)
    assert told["not_run"]["bad"] == "RuntimeError: no memory"
    assert told["machine"]["threads"] == 1
    assert told["machine"]["torch"] == torch.__version__.partition("+")[0]
    assert len(told["machine"]["load_average"]) == 3
    assert "| bad | not run: RuntimeError: no memory | | | |" in capsys.readouterr().out


@pytest.mark.usefixtures("two_rows")
def test_rows_can_be_chosen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "bench.json"
    assert run.main(["--rows", "good too", "--output", str(file)]) == 0  # a missing GPU is no failure
    assert [r["id"] for r in json.loads(file.read_text())["rows"]] == ["good too"]
    assert run.main(["--rows", "good", "--output", str(file)]) == 0  # the first word of several
    assert [r["id"] for r in json.loads(file.read_text())["rows"]] == ["good", "good too"]
    if not torch.cuda.is_available():
        assert set(json.loads(file.read_text())["not_run"].values()) == {"no GPU"}
    with pytest.raises(SystemExit):
        run.main(["--rows", "fast"])
    assert "Expected `--rows` to be some of good, good too, bad, but got fast" in capsys.readouterr().err


def test_every_word_of_the_script_is_followed_by_the_next_place() -> None:
    following = followers()
    assert following["<|vision_end|>"] == following["\n"] == set(SCRIPT[0])
    assert following["1"] == {"4", ","}  # the place between may be passed over
    assert following["4"] == {","}
    assert "]}" not in following  # the environment goes on
    words = [word for place in SCRIPT for word in place if word != "?"]
    assert len(words) == len(set(words))  # the next word depends on the last one alone


@pytest.mark.slow
def test_both_sides_of_the_published_algorithm_look_twice() -> None:
    """Theirs encodes the image 4 times and the first crop 3 times a trajectory, in turns and update; ours each once."""
    found = against_authors(steps=1, group=2, warm_up=0)
    detail = found.detail
    assert detail["crops_a_trajectory"] == {"ours": 2, "published": 2}
    assert 3 * 21 <= detail["sampled_tokens_a_trajectory"] <= 3 * 22
    assert detail["encoded_images_a_step"] == {"ours": 2 + 4 * 2, "published": 4 * (1 + 2 + 3 + 3)}
    assert detail["computed_positions_a_step"]["published"] > 1.5 * detail["computed_positions_a_step"]["ours"]
    assert found.value > 0


def test_the_plain_loop_continues_from_its_cache() -> None:
    """What the loop samples from is what it learns: token by token equals one pass."""
    torch.manual_seed(0)
    policy = Policy(30)
    x = torch.randn(2, 9, 96)
    whole, _ = policy.run(x)
    some, cache = policy.run(x[:, :4])
    chunk, cache = policy.run(x[:, 4:7], cache)
    one, cache = policy.run(x[:, 7:8], cache)
    last, _ = policy.run(x[:, 8:], cache)
    torch.testing.assert_close(torch.cat([some, chunk, one, last], 1), whole, rtol=1e-4, atol=1e-5)


def test_the_plain_loop_rolls_out_and_learns() -> None:
    torch.manual_seed(0)
    loop = PlainLoop(30, questions=2, group=3)
    before = {name: p.detach().clone() for name, p in loop.policy.named_parameters()}
    loop.step()
    changed = {name.split(".")[0] for name, p in loop.policy.named_parameters() if not torch.equal(p, before[name])}
    assert {"layers", "projector", "words", "head"} <= changed
    assert not {"tower", "patches", "places"} & changed  # frozen, as in the quickstart
    assert (loop.sampled, loop.crops) == (2 * 3 * 9, 2 * 3)
    assert loop.crop(torch.zeros(6, 4, dtype=torch.long)).shape == (6, 3, CROP, CROP)


def test_the_quickstart_is_compared_as_it_is_run() -> None:
    found = against_plain_loop(steps=2, warm_up=2, images=12)
    assert found.detail["trajectories_a_step"] == {"ours": 128, "plain_loop": 128}
    assert found.detail["sampled_tokens_a_trajectory"]["plain_loop"] == 9
    assert found.value > 0


TINY = Size(
    text={
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
    },
    vision={
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": 64,
        "fullatt_block_indexes": [1],
    },
    pixels=112,
    copied=16,
    multiplied=128,
)
VOCABULARY = 152_064


def test_a_decode_step_is_held_against_all_weights_and_all_that_is_kept() -> None:
    found = decode_step(TINY, "cpu", group=2, lengths=(4, 16), rounds=1)
    layer = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128 + (64 + 2 * 32) + 2 * 64  # products, their biases, norms
    assert found.detail["weights_bytes"] == 2 * (2 * layer + 64 + VOCABULARY * 64)  # of bfloat16; with the last norm
    tokens = found.detail["cache_bytes"] / (4 * 2 * 2 * 2 * 16 * 2)  # trajectories, layers, keys and values, heads
    assert 16 + 10 < tokens < 16 + 10 + 40  # 4 x 4 of the image, half of 4 + 16, and the words around
    assert found.value > 0


def test_operations_of_a_learners_step_are_twice_a_forward_passs() -> None:
    found = lora_step(TINY, "cpu", group=2, tokens=8, rounds=1)
    head = 2 * 16 * 64 * VOCABULARY
    assert found.detail["tokens"] == 16
    weights = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
    adapters = 2 * 16 * (2 * 128 + 2 * 96 + 3 * 192)
    positions = (found.detail["operations"] / 2 - head) / (2 * (weights + adapters))
    assert 16 + 16 < positions < 1.1 * (16 + 16 + 40)  # the prompt once, both completions, and some attention
    assert found.value > 0
