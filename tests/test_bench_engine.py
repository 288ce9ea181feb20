"""The benchmarks in process on tiny shapes, on the CPU: each runs, and what its JSON file says can be true."""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from bench import reference
from bench.__main__ import main
from bench.bars import Bar, Results, all_bars
from bench.decode import generate_step_s, make_row
from bench.engine import Engine, Stream, as_new, decode_together, random_prompt, sampling
from bench.memory import read_rows
from bench.models import BenchModel, Phases, load, load_library_model, source_of
from bench.report import Unable
from bench.same_answer import compare
from bench.shapes import SHAPES, make_model, make_tokenizer
from config import PROJECT_ROOT, EngineOptions, Limits, Settings
from models.loader import load_model
from models.schemas import Message, SamplingParams, TextRequest
from models.snapshots import find_snapshots
from models.tokenizer import TextTokenizer

GPU_RUN = str(PROJECT_ROOT / "tools" / "gpu_run.sh")
Bench = Callable[..., dict[str, Any]]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    """`python -m bench NAME ...`, which must succeed: what its JSON file holds."""

    def run(*arguments: str) -> dict[str, Any]:
        file = tmp_path / "bench.json"
        assert main([*arguments, "--json", str(file)]) == 0
        told: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return told

    return run


def options(**given: Any) -> argparse.Namespace:
    values = dict(model=None, shape="tiny", device="cpu", dtype="auto", no_graphs=False, compile="auto")
    return argparse.Namespace(**{**values, **given})


@pytest.fixture(scope="module")
def tiny() -> BenchModel:
    return load(source_of(options()), 8)


# Each benchmark runs.


def test_decode_tells_steps_rates_and_ratios_to_generate(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    small = ("--context", "20", "--tokens", "4", "--rounds", "2", "--generate-limit", "2")
    told = bench("decode", "--shape", "tiny", "--batch", "1,2,20", *small)
    rows = told["rows"]
    assert [row["batch"] for row in rows] == [1, 2, 20]
    for row in rows:
        assert 0 < row["least_s"] <= row["step_s"] <= row["greatest_s"]
        assert row["tokens_per_s"] == pytest.approx(row["batch"] / row["step_s"])
        assert row["ratio_in_turn"] == pytest.approx(row["batch"] * rows[0]["generate_step_s"] / row["step_s"])
        assert row["reference_s"] is None, "nothing was measured elsewhere with this shape"
    assert rows[0]["ratio"] == pytest.approx(rows[0]["generate_step_s"] / rows[0]["step_s"])
    assert rows[2]["generate_step_s"] is None, "beyond the limit"
    assert told["options"]["device_type"] == "cpu"
    assert "generate" in capsys.readouterr().out


def test_decode_runs_without_generate_sampled_and_on_a_model_of_pictures(bench: Bench) -> None:
    small = ("--batch", "2", "--context", "20", "--tokens", "4", "--rounds", "1")
    (row,) = bench("decode", "--shape", "tiny-vl", "--sampled", "--no-generate", *small)["rows"]
    assert row["is_sampled"] and row["step_s"] > 0 and row["generate_step_s"] is None


def test_prefill_tells_first_tokens_and_how_long_a_long_prompt_holds_streams_back(bench: Bench) -> None:
    small = ("--prompt-tokens", "32", "--long-tokens", "300", "--streams", "3", "--rounds", "1")
    *rows, long = bench("prefill", "--shape", "tiny", "--prompts", "1,4", *small)["rows"]
    assert [row["num_prompts"] for row in rows] == [1, 4]
    for row in rows:
        assert 0 < row["mean_first_token_s"] <= row["all_first_tokens_s"]
        assert row["tokens_per_s"] == pytest.approx(row["num_prompts"] * 32 / row["all_first_tokens_s"])
    assert long["long_tokens"] == 300 and long["num_streams"] == 3
    assert long["held_back_s"] == pytest.approx(max(0.0, long["pause_s"]["max"] - long["step_s"]))
    assert long["first_token_s"] > 0


def test_vision_tells_first_tokens_with_and_without_the_processor(bench: Bench) -> None:
    small = ("--pictures", "112x84", "--tokens", "4", "--rounds", "1", "--batch", "2")
    *rows, decode = bench("vision", "--shape", "tiny-vl", "--requests", "1,3", *small)["rows"]
    assert [row["num_pictures"] for row in rows] == [1, 3]
    for row in rows:
        assert row["processor_s"] > 0 and row["engine_s"] > 0
        # 4 x 3 visual tokens and the template around them.
        assert row["prompt_tokens"] > 12
    assert rows[0]["all_first_tokens_s"] > 0
    assert decode["batch"] == 2 and decode["tokens_per_s"] == pytest.approx(2 / decode["step_s"])


def test_pair_tells_shares_of_both_models_and_their_sum(bench: Bench) -> None:
    small = ("--text-streams", "2", "--image-streams", "2", "--duration", "0.3", "--rounds", "1")
    lengths = ("--prompt-tokens", "16", "--answer-tokens", "8", "--pictures", "56x56")
    told = bench("pair", "--shape", "tiny", "--picture-shape", "tiny-vl", *small, *lengths)
    rows = {(row["kind"], row["is_alone"]): row for row in told["rows"]}
    shares = [rows[kind, False]["tokens_per_s"] / rows[kind, True]["tokens_per_s"] for kind in ("text", "pictures")]
    assert [rows[kind, False]["share"] for kind in ("text", "pictures")] == pytest.approx(shares)
    assert told["options"]["share_sum"] == pytest.approx(sum(shares))


def test_same_answer_finds_no_difference_in_fp32_on_a_cpu(bench: Bench) -> None:
    rows = bench("same-answer", "--shape", "tiny", "--batch", "4", "--prompt-tokens", "16", "--tokens", "8")["rows"]
    assert [row["is_sampled"] for row in rows] == [False, True]
    assert all(row["differing_answers"] == row["differing_tokens"] == 0 for row in rows)
    assert all(row["num_answers"] == 4 for row in rows)


def test_plots_are_png_files(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "decode.png"
    small = ("--batch", "1,2", "--context", "8", "--tokens", "2", "--rounds", "1")
    assert main(["decode", "--shape", "tiny", "--no-generate", *small, "--plot", str(file)]) == 0
    with Image.open(file) as picture:
        assert picture.format == "PNG"


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["vision", "--shape", "tiny"], "it must be one of qwen2.5-vl-7b, tiny-vl"),
        (["pair", "--shape", "tiny-vl", "--picture-shape", "tiny-vl"], "it must be one of qwen3-8b, tiny"),
        (["pair", "--shape", "tiny", "--picture-shape", "tiny"], "--picture-shape tiny"),
        (["decode", "--model", "/nowhere"], "not a folder"),
        (["vision"], "no embedded model"),
        (["prefill", "--shape", "tiny", "--long-tokens", "16384"], "at most 16383"),
        (["bars", "/nowhere"], "no such folder"),
    ],
)
def test_what_cannot_be_measured_is_refused_with_a_sentence(
    arguments: list[str], what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if arguments == ["vision"] and (PROJECT_ROOT / "vision/demo").exists():
        pytest.skip("there is an embedded model")
    assert main(arguments) == 2
    assert what in capsys.readouterr().err


# What is measured is what it is said to be.


def test_every_stream_of_a_batch_is_decoding_while_steps_are_timed(tiny: BenchModel) -> None:
    dice = random.Random(0)
    prompts = [random_prompt(dice, tiny, 10 + 30 * index) for index in range(4)]
    with Engine([(tiny, tiny.make_runner(4, 200))]) as engine:
        done = decode_together(engine, tiny.name, prompts, 6, 0.0)
    assert (done.num_streams, done.num_steps) == (4, 6)
    assert done.tokens_per_s == pytest.approx(4 * 6 / done.seconds)


def test_streams_added_together_are_read_in_one_step(tiny: BenchModel) -> None:
    dice = random.Random(0)
    streams = [Stream(random_prompt(dice, tiny, 20), sampling(1)) for _ in range(6)]
    with Engine([(tiny, tiny.make_runner(8, 50))]) as engine:
        engine.run(tiny.name, streams)
    assert [stream.reason for stream in streams] == ["length"] * 6
    assert len({stream.sequence.started_at for stream in streams}) == 1


def test_a_prompt_under_a_new_name_is_no_prefix_hit_and_gets_the_same_answer(tiny: BenchModel) -> None:
    dice = random.Random(0)
    prompt = random_prompt(dice, tiny, 64)
    with Engine([(tiny, tiny.make_runner(2, 100))]) as engine:
        streams = [Stream(p, sampling(4)) for p in (prompt, as_new(dice, prompt), prompt)]
        reused = []
        for stream in streams:
            engine.run(tiny.name, [stream])
            reused.append(engine.reused_tokens(tiny.name))
    assert reused[0] == reused[1] < reused[2]
    assert streams[0].output_ids == streams[1].output_ids == streams[2].output_ids


def test_a_stream_that_fails_ends_the_benchmark_with_its_error(tiny: BenchModel) -> None:
    too_long = Stream(random_prompt(random.Random(0), tiny, 1), sampling(1))
    too_long.sequence.prompt_ids = (1,) * 10**5
    with Engine([(tiny, tiny.make_runner(2, 50))]) as engine, pytest.raises(Unable, match="do not fit"):
        engine.run(tiny.name, [too_long])


def test_generate_is_timed_from_its_first_token_on() -> None:
    model = load_library_model(source_of(options()))
    assert generate_step_s(model, [(5, 6, 7), (8, 9, 10)], 4, 0.0) > 0
    assert generate_step_s(model, [(5, 6, 7)], 4, 0.7) > 0


def test_ratios_are_of_times_in_the_same_round() -> None:
    arguments = argparse.Namespace(sampled=False, context=8, tokens=4)
    row = make_row(4, arguments, [1.0, 2.0, 4.0], [4.0, 4.0], alone_s=3.0, reference_s=None, scaled_s=None)
    assert (row.step_s, row.least_s, row.greatest_s) == (2.0, 1.0, 4.0)
    assert (row.ratio, row.least_ratio, row.greatest_ratio) == (2.0, 2.0, 4.0)
    assert row.ratio_in_turn == 4 * 3.0 / 2.0


def test_differences_are_counted_by_answers_and_by_tokens() -> None:
    row = compare([([1, 2, 3, 4], [1, 2, 9, 9]), ([1, 2, 3, 4], [1, 2, 3, 4])], True, 4)
    assert (row.differing_answers, row.differing_tokens, row.first_difference) == (0.5, 0.25, 2)


# True shapes.


@pytest.mark.parametrize(
    ("name", "parameters", "kv_bytes_per_token"),
    [("qwen3-8b", 8.19e9, 144 * 1024), ("qwen2.5-vl-7b", 8.29e9, 56 * 1024)],
)
def test_shapes_have_the_size_of_the_true_models(name: str, parameters: float, kv_bytes_per_token: int) -> None:
    model = make_model(SHAPES[name], torch.device("meta"), torch.float16)
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(parameters, rel=0.002)
    text = model.config.get_text_config()
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    assert 2 * 2 * text.num_hidden_layers * text.num_key_value_heads * head_dim == kv_bytes_per_token


def test_every_id_of_a_vocabulary_has_text_and_no_prompt_needs_the_filling() -> None:
    tokenizer = TextTokenizer(make_tokenizer(4096))
    assert all(tokenizer.decode([token_id]) for token_id in range(7, 4096))
    assert max(tokenizer.encode_content("time года 000999 004000")) < 2000


@pytest.mark.parametrize(("shape", "name"), [("tiny", "avibe"), ("tiny-vl", "avision")])
def test_snapshot_is_one_that_the_service_loads(shape: str, name: Any, tmp_path: Path) -> None:
    folder = tmp_path / "snapshot"
    assert main(["snapshot", "--shape", shape, str(folder)]) == 0
    settings = Settings.model_validate({f"{name.upper()}_MODEL_PATH": str(folder)})
    engine, phases = EngineOptions(device="cpu"), Phases()
    loaded = load_model(find_snapshots(settings)[name], engine=engine, limits=Limits(), phase=phases)
    assert "weights" in phases.seconds and loaded.dtype == "float32"
    encoder = loaded.make_encoder(1000)
    assert encoder.encode(TextRequest((Message("user", "time and year"),), SamplingParams(1, 0.0)), lambda: None).ids
    assert main(["snapshot", "--shape", shape, str(folder)]) == 2, "it must not write over anything"


# The bars.


def write(folder: Path, name: str, rows: Sequence[dict[str, Any]], **chosen: Any) -> None:
    machine = {"gpus": ["NVIDIA H200"], "cpu": "x"}
    told = {"machine": machine, "options": chosen, "rows": list(rows)}
    (folder / f"{name}.json").write_text(json.dumps(told))


def test_bars_are_scaled_by_copy_bandwidth_where_memory_binds(tmp_path: Path) -> None:
    step_s = 1.01 * reference.DECODE_S[1] * reference.COPY_GB_PER_S / 4000
    write(tmp_path, "decode", [{"batch": 1, "step_s": step_s}], copy_gb_per_s=4000.0)
    write(tmp_path, "prefill", [{"num_prompts": 128, "all_first_tokens_s": 1.2}, {"held_back_s": 0.06}])
    bars = {bar.what: bar for bar in all_bars(Results(tmp_path))}
    assert bars["decode, batch 1, greedy"].here == pytest.approx(6.99 * 0.75)
    assert bars["decode, batch 1, greedy"].verdict() == "FAIL scaled, pass there"
    assert bars["decode, batch 8, greedy"].verdict() == "not measured"
    assert bars["prefill, 128 prompts of 448 tokens"].verdict() == "pass"
    assert bars["a long prompt holds streams back"].verdict() == "FAIL"


@pytest.mark.parametrize(("ours", "verdict"), [(10.0, "pass"), (10.1, "FAIL")])
def test_a_bar_is_reached_at_its_own_value(ours: float, verdict: str) -> None:
    assert Bar("x", "ms", 10.0, None, ours).verdict() == verdict
    assert Bar("x", "per s", -10.0, None, -ours, False).verdict() == verdict


def test_bars_print_one_markdown_table_and_fail_if_one_is_not_reached(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, "pair", [], share_sum=1.05)
    (tmp_path / "cut.json").write_text('{"rows": [')
    assert main(["bars", str(tmp_path)]) == 1
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in table} == {7}
    assert "| both models busy, in process | sum of shares | ≥ 1.10 |  | 1.05 | FAIL |" in table
    assert main(["bars", str(tmp_path), "--tried-out"]) == 0


def test_memory_is_read_from_what_prometheus_is_told() -> None:
    lines = [
        f'avito_memory_planned_bytes{{model="avibe",purpose="{purpose}"}} {value}'
        for purpose, value in (("weights", 1.0), ("workspace", 2.0), ("kv_cache", 3e9))
    ]
    text = "# TYPE avito_memory_planned_bytes gauge\n" + "\n".join(lines)
    text += '\n# TYPE avito_kv_cache_capacity_tokens gauge\navito_kv_cache_capacity_tokens{model="avibe"} 4096\n'
    (row,) = read_rows(text)
    assert (row.weights_bytes, row.workspace_bytes, row.kv_cache_bytes) == (1, 2, 3 * 10**9)
    assert row.kv_cache_tokens == 4096


# The script for a card.


def test_gpu_script_runs_single_steps_and_ends_with_the_table(tmp_path: Path) -> None:
    environ = {"PATH": "/usr/bin:/bin", "PYTHON": sys.executable, "FOLDER": str(tmp_path), "OUT": str(tmp_path / "out")}
    done = subprocess.run(
        [GPU_RUN, "--tiny", "same-answer"], env=environ, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "same-answer: ok" in done.stdout
    assert "| same answer, greedy: answers other than alone | % |  |  | 0.00 | - |" in done.stdout
    assert (tmp_path / "out" / "report.md").read_text().startswith("On ")
    assert (tmp_path / "out" / "results.tar.gz").stat().st_size > 0


def test_gpu_script_goes_on_after_a_step_that_fails_and_says_so(tmp_path: Path) -> None:
    environ = {"PATH": "/usr/bin:/bin", "PYTHON": "/bin/false", "FOLDER": str(tmp_path)}
    command = [GPU_RUN, "--tiny", "decode", "prefill"]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "decode: FAILED with exit code 1" in done.stdout and "failed: decode prefill" in done.stdout


def test_gpu_script_refuses_a_step_that_there_is_not() -> None:
    command = [GPU_RUN, "nonsense"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2 and "no step nonsense" in done.stderr
