"""The time of a conversion: constants as they were measured, work that is exact, stages that overlap as they do."""

from __future__ import annotations

import json
import re
from dataclasses import fields, replace
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
from nvquant.checkpoint.source import Checkpoint, open_checkpoint
from nvquant.errors import InputError
from nvquant.format.layouts import LAYOUTS
from nvquant.plan import measured
from nvquant.plan.conversion import as_json, forecast_conversion
from nvquant.plan.gpus import GPUS
from nvquant.plan.machines import BF16_TFLOPS, DISKS, Disk, Machine, find_gpu
from nvquant.plan.measured import CPU_RATES, GPU_RATES, Measured
from nvquant.plan.plan import Plan, compute_plan
from nvquant.plan.times import disk_bytes, forecast_times, pipeline_seconds
from nvquant.plan.work import Work, attention_flop, measure_work
from nvquant.recipe.load import load_recipe
from support import synthetic_gemma4
from support.measured_runs import APART, RESULTS, RUNS, SOURCES, MeasuredRun
from support.synthetic_dense import LLAMA_405B, Dense, headers_only
from support.synthetic_gemma4 import BYTES_31B

H200 = Machine("H200", 1, DISKS["ram"])
SMALL = Dense(layers=4, hidden=64, intermediate=128, heads=4, kv_heads=2, head_dim=16, vocabulary=256)


@pytest.fixture(scope="module")
def gemma() -> Checkpoint:
    return headers_only(synthetic_gemma4.tensor_shapes(), synthetic_gemma4.config())


def planned(source: Checkpoint, recipe: str = "nvfp4") -> Plan:
    return compute_plan(source, load_recipe(recipe), LAYOUTS["compressed-tensors"], "model")


def dense_plan(dense: Dense, recipe: str = "nvfp4") -> Plan:
    return planned(headers_only(dense.shapes(), dense.config()), recipe)


def work_of(plan: Plan, samples: int = 128, length: int = 2048, batch: int = 1) -> Work:
    return measure_work(plan, samples, length, batch)


# The constants


def value_in(document: Any, path: str) -> float:
    """The number at a dotted path; keys may hold dots and spaces themselves."""
    if not path:
        return float(document)
    key = next(key for key in document if path == key or path.startswith(f"{key}."))
    return value_in(document[key], path[len(key) + 1 :])


def evaluate(file: str, expression: str) -> float:
    document = json.loads((RESULTS / file).read_text(encoding="utf-8"))
    numbers = re.sub(r"\{([^}]+)\}", lambda found: repr(value_in(document, found[1])), expression)
    assert re.fullmatch(r"[\d.e+\-*/() ]+", numbers), expression
    return float(eval(numbers))


def constants() -> list[tuple[str, Measured]]:
    found = [(name, value) for name, value in vars(measured).items() if isinstance(value, Measured)]
    for kind, rates in (("gpu", GPU_RATES), ("cpu", CPU_RATES)):
        for field in fields(rates):
            value = getattr(rates, field.name)
            each = value.items() if isinstance(value, dict) else [("", value)]
            found += [(f"{kind} {field.name} {name}".strip(), constant) for name, constant in each]
    return found


@pytest.mark.parametrize(("name", "constant"), constants(), ids=[name for name, _ in constants()])
def test_a_constant_is_what_its_source_says(name: str, constant: Measured) -> None:
    if constant == measured.ASSUMED_CPU_SOLVING:
        assert constant.sources == ()
        return
    if name == "cpu call_seconds":  # on a CPU nothing waits for launches
        assert constant == Measured(0.0, ())
        return
    assert constant.value == pytest.approx(mean(evaluate(*source) for source in constant.sources), rel=1e-3)


def test_the_counts_in_the_sources_are_those_that_the_forecast_makes() -> None:
    works = {run.model + run.recipe: work_of(run.plan(), run.samples, run.sequence_length) for run in RUNS}
    written = {word for _, constant in constants() for _, text in constant.sources for word in re.findall(r"\d+", text)}

    def attention(work: Work) -> int:
        return work.samples * sum(layer.attention_flop for layer in work.layers)

    def linear(work: Work) -> float:
        return work.samples * work.sequence_length * sum(layer.linear_flop for layer in work.layers)

    six, smol = works["6 layersnvfp4"], works["SmolLM2-135Mnvfp4-full"]
    whole = [works[f"60 layers, text{recipe}"] for recipe in ("nvfp4", "nvfp4-full")]
    half = works["30 layersnvfp4-a16"]
    counted = [attention(six), linear(smol) + attention(smol), whole[0].copied_bytes, smol.copied_bytes]
    counted += [sum(layer.elements for layer in work.layers) for work in (six, *whole, half, smol)]
    solved = next(work_of(run.plan(), run.samples, run.sequence_length) for run in RUNS if run.quantizer == "gptq")
    tokens = solved.samples * solved.sequence_length
    counted += [
        sum(layer.moment_flop for layer in solved.layers) * tokens,
        sum(layer.solve_flop for layer in solved.layers),
    ]
    counted += [
        sum(
            layer.passes * (layer.linear_flop * tokens + layer.attention_flop * solved.samples)
            for layer in solved.layers
        )
    ]
    assert {str(int(count)) for count in counted} == {word for word in written if len(word) > 5}
    document = json.loads((RESULTS / RUNS[0].file).read_text(encoding="utf-8"))
    assert linear(six) == document["work"]["matmul_flop"]


# The forecast beside what was measured


@pytest.mark.parametrize("run", RUNS, ids=[run.words for run in RUNS])
def test_the_forecast_is_within_a_fifth_of_the_measured_run(run: MeasuredRun) -> None:
    found, measured_run = run.forecast(), run.document()
    assert found.times.conversion_seconds == pytest.approx(measured_run["seconds"], rel=0.2)
    assert found.times.total_seconds == pytest.approx(measured_run["wall_seconds"], rel=0.2)


@pytest.mark.parametrize("run", APART, ids=[run.words for run in APART])
def test_the_forecast_is_within_a_quarter_of_runs_that_it_was_not_made_from(run: MeasuredRun) -> None:
    found, measured_run = run.forecast(), run.document()
    assert found.times.conversion_seconds == pytest.approx(measured_run["seconds"], rel=0.25)
    assert found.times.total_seconds == pytest.approx(measured_run["wall_seconds"], rel=0.25)
    assert measured_run["peak_rss_bytes"] < found.memory.host_bytes
    assert found.memory.gpu_bytes == pytest.approx(measured_run["peak_gpu_bytes"], rel=0.2)


def test_the_forecast_says_when_a_second_gpu_makes_a_run_slower() -> None:
    one, two = (run.forecast().times for run in APART[:2])
    measured_one, measured_two = (run.document()["seconds"] for run in APART[:2])
    assert two.conversion_seconds > one.conversion_seconds and measured_two > measured_one
    assert two.bound_by == "the disk"


@pytest.mark.parametrize("run", RUNS, ids=[run.words for run in RUNS])
def test_a_forecast_of_measured_runs_names_the_stage_that_they_waited_for(run: MeasuredRun) -> None:
    phases = run.document()["phases"]
    waited = phases["wait for read"] > 0.3 * run.document()["seconds"]
    assert (run.forecast().times.bound_by == "reading") == waited


@pytest.mark.parametrize("run", [pytest.param(run, id=run.words) for run in RUNS if not run.has_budget])
def test_memory_is_an_upper_estimate_that_is_not_far_off(run: MeasuredRun) -> None:
    memory, measured_run = run.forecast().memory, run.document()
    assert measured_run["peak_host_bytes"] <= memory.host_bytes < 2 * measured_run["peak_host_bytes"]
    assert memory.gpu_bytes == pytest.approx(measured_run["peak_gpu_bytes"], rel=0.15)


# The work


def test_bytes_are_those_of_the_source_and_of_the_plan(gemma: Checkpoint) -> None:
    for recipe in ("nvfp4", "nvfp4-full", "nvfp4-a16"):
        plan = planned(gemma, recipe)
        work = work_of(plan)
        assert work.source_bytes == BYTES_31B
        assert work.written_bytes == plan.file_bytes
        assert sum(layer.elements for layer in work.layers) == sum(m.rows * m.cols for m in plan.matrices.values())
        assert len(work.layers) == 60
        assert work.samples == (0 if recipe == "nvfp4-a16" else 128)


def test_operations_of_the_31b_are_two_for_each_weight_and_token(gemma: Checkpoint) -> None:
    layers = work_of(planned(gemma)).layers
    mlp, hidden = 3 * 21504 * 5376, 5376
    assert layers[0].linear_flop == 2 * (mlp + hidden * 256 * (32 + 16 + 16 + 32))
    assert layers[5].linear_flop == 2 * (mlp + hidden * 512 * (32 + 4 + 32)), "a full layer has no v_proj"


def test_attention_counts_the_pairs_that_mask_and_window_leave() -> None:
    config = {"num_attention_heads": 3, "head_dim": 5, "sliding_window": 4, "num_hidden_layers": 2}
    config["layer_types"] = ["sliding_attention", "full_attention"]

    def pairs(window: int, tokens: int) -> int:
        return sum(query - window < key <= query for query in range(tokens) for key in range(tokens))

    for tokens in (1, 3, 4, 5, 11):
        assert attention_flop(config, 0, tokens) == 4 * 3 * 5 * pairs(4, tokens)
        assert attention_flop(config, 1, tokens) == 4 * 3 * 5 * pairs(tokens, tokens)
        assert attention_flop({"text_config": config}, 1, tokens) == attention_flop(config, 1, tokens)
    assert attention_flop({}, 0, 8) == 0


def test_of_experts_a_token_computes_those_that_it_uses() -> None:
    shapes = {**SMALL.shapes(), "model.layers.0.mlp.experts.gate_up_proj": (8, 96, 64)}
    config = {**SMALL.config(), "num_experts": 8, "num_experts_per_tok": 2}
    recipe = load_recipe("nvfp4").model_copy(update={"experts": "bf16"})
    works = [
        work_of(compute_plan(headers_only(shapes, found), recipe, LAYOUTS["compressed-tensors"], "model"))
        for found in (config, SMALL.config())
    ]
    first, without_number = (work.layers[0].linear_flop for work in works)
    assert first - without_number == 2 * 8 * 96 * 64 * 2 / 8
    assert first - works[0].layers[1].linear_flop == 2 * 2 * 96 * 64
    assert works[0].layers[0].read_bytes - works[0].layers[1].read_bytes == 2 * 8 * 96 * 64, "all are read"


# The stages


@pytest.mark.parametrize(
    ("reads", "computes", "writes", "seconds"),
    [
        ([1, 1, 1], [5, 5, 5], [1, 1, 1], 1 + 15 + 1),  # computing is slowest
        ([5, 5, 5], [1, 1, 1], [1, 1, 1], 15 + 1 + 1),  # reading
        ([1, 1, 1], [1, 1, 1], [5, 5, 5], 1 + 1 + 15),  # writing
        ([2], [3], [4], 9),
        ([], [], [], 0),
        # The third is not read before the first has left its buffer, and not handed over before it is written.
        ([1, 1, 9], [1, 9, 1], [1, 1, 1], 11 + 1 + 1),
        ([1, 1, 1, 1], [1, 1, 1, 1], [9, 1, 1, 1], 1 + 1 + 9 + 3),
    ],
)
def test_stages_overlap_with_two_layers_on_the_device_and_two_on_their_way(
    reads: list[float], computes: list[float], writes: list[float], seconds: float
) -> None:
    assert pipeline_seconds([0.0] * len(reads), reads, computes, writes) == seconds


def test_a_stage_waits_for_what_comes_before_it() -> None:
    nothing = [0.0, 0.0]
    assert pipeline_seconds(nothing, [1, 1], [1, 1], [1, 1], begin=10) == 14
    assert pipeline_seconds(nothing, [1, 1], [1, 1], [1, 1], ready=10) == 13
    assert pipeline_seconds([0.0, 20.0], [1, 1], [1, 1], [1, 1]) == 23


def test_more_tokens_layers_and_bytes_take_longer(gemma: Checkpoint) -> None:
    machine = Machine("RTX 4090", 1, DISKS["nvme"])

    def seconds(plan: Plan, samples: int = 128, length: int = 2048) -> float:
        return forecast_times(work_of(plan, samples, length), "mse", machine).total_seconds

    plan = planned(gemma)
    assert seconds(plan) < seconds(plan, 129) < seconds(plan, 256) < seconds(plan, 256, 4096)
    by_layers = [
        seconds(planned(headers_only(synthetic_gemma4.tensor_shapes(n), synthetic_gemma4.config(n))))
        for n in (6, 7, 30, 60)
    ]
    assert by_layers == sorted(by_layers)
    assert seconds(planned(gemma, "nvfp4-a16")) < seconds(plan)


def test_a_faster_machine_takes_no_longer(gemma: Checkpoint) -> None:
    work = work_of(planned(gemma))
    by_speed = sorted(BF16_TFLOPS, key=lambda gpu: BF16_TFLOPS[gpu])
    seconds = [forecast_times(work, "mse", Machine(gpu, 1, DISKS["nvme"])).total_seconds for gpu in by_speed]
    assert seconds == sorted(seconds, reverse=True)
    assert seconds[0] > 5 * seconds[-1]
    disks = [Disk("", rate, rate) for rate in (0.1e9, 1e9, 10e9)]
    by_disk = [forecast_times(work, "mse", Machine("H200", 1, disk)).total_seconds for disk in disks]
    assert by_disk == sorted(by_disk, reverse=True)


def test_a_batch_costs_its_launches_however_few_tokens_it_has(gemma: Checkpoint) -> None:
    plan = planned(gemma)
    one_at_a_time, eight = (forecast_times(work_of(plan, 128, 16, batch), "mse", H200) for batch in (1, 8))
    assert one_at_a_time.forward_seconds == pytest.approx(60 * 128 * GPU_RATES.call_seconds.value)
    assert eight.forward_seconds == pytest.approx(60 * 16 * GPU_RATES.call_seconds.value)


def test_a_disk_bounds_all_that_goes_over_it(gemma: Checkpoint) -> None:
    work = work_of(planned(gemma))
    slow = Machine("H200", 1, Disk("", 0.2e9, 0.1e9))
    times = forecast_times(work, "mse", slow)
    assert times.bound_by == "the disk"
    assert times.disk_seconds == pytest.approx(work.source_bytes / 0.2e9 + work.written_bytes / 0.1e9)
    assert times.conversion_seconds == pytest.approx(GPU_RATES.begin_seconds.value + times.disk_seconds)


def test_a_network_bounds_the_run_and_gives_each_shard_once(gemma: Checkpoint) -> None:
    work = work_of(planned(gemma))
    machine = Machine("H200", 1, DISKS["nvme"], 0.1e9)
    whole, ranges = (forecast_times(work, "mse", replace(machine, low_disk=low)) for low in (False, True))
    assert whole.bound_by == ranges.bound_by == "the network"
    assert whole.network_seconds == ranges.network_seconds == sum(work.shards.values()) / 0.1e9
    # Shards hold layers in the order of their names as text: what must be there whole is waited for.
    assert whole.conversion_seconds >= ranges.conversion_seconds >= ranges.network_seconds
    assert whole.disk_seconds > ranges.disk_seconds


def test_every_process_reads_every_layer_of_a_calibrated_run(gemma: Checkpoint) -> None:
    work, disk = work_of(planned(gemma)), DISKS["nvme"]
    one, eight = (forecast_times(work, "mse", Machine("H200", n, disk)) for n in (1, 8))
    assert eight.disk_seconds - one.disk_seconds == pytest.approx(7 * work.layer_bytes / disk.read_bytes)
    assert eight.forward_seconds == pytest.approx(one.forward_seconds / 8)
    assert eight.quantize_seconds == pytest.approx(one.quantize_seconds / 8)
    without = work_of(planned(gemma, "nvfp4-a16"))
    one, eight = (forecast_times(without, "mse", Machine("H200", n, disk)) for n in (1, 8))
    assert eight.disk_seconds == one.disk_seconds, "whole layers are shared out"
    assert eight.conversion_seconds <= one.conversion_seconds


def test_disk_to_be_free_is_the_output_and_what_is_kept_beside_it(gemma: Checkpoint) -> None:
    plan = planned(gemma)
    work = work_of(plan)
    here = Machine("H200", 1, DISKS["nvme"])
    hub = replace(here, network_bytes=1e8)
    assert disk_bytes(work, here) == plan.file_bytes
    shards = sum(header.file_bytes for header in plan.source.shards.values())
    assert disk_bytes(work, hub) == plan.file_bytes + shards
    embeddings = (
        262144 * 5376 * 2 + 5376 * 2
    )  # the decoder's own tensors around its layers; the tower is not read twice
    assert disk_bytes(work, replace(hub, low_disk=True)) == plan.file_bytes + embeddings
    without = work_of(planned(gemma, "nvfp4-a16"))
    assert disk_bytes(without, replace(hub, low_disk=True)) == without.written_bytes


# The machines


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("H200", (1, "H200")),
        ("8xH100", (8, "H100 80 GB")),
        ("8 x NVIDIA H100 80GB", (8, "H100 80 GB")),
        ("rtx-4090", (1, "RTX 4090")),
        ("GeForce RTX 5090", (1, "RTX 5090")),
        ("2xrtx pro 6000", (2, "RTX PRO 6000")),
        ("rtx 5060 ti", (1, "RTX 5060 Ti 16 GB")),
        ("cpu", (1, None)),
        ("A100", (1, "A100 80 GB")),
    ],
)
def test_a_gpu_is_found_however_it_is_written(text: str, found: tuple[int, str | None]) -> None:
    assert find_gpu(text) == found


@pytest.mark.parametrize("text", ["A10", "H1", "GB10", "", "8x", "TPU", "80 GB"])
def test_a_gpu_that_is_not_known_is_refused_with_those_that_are(text: str) -> None:
    with pytest.raises(InputError, match=r": choose .*RTX 4090, .*H200, .* or cpu"):
        find_gpu(text)


def test_no_machine_at_all_is_refused() -> None:
    with pytest.raises(InputError, match="--on 0xH200: the number of machines is 0"):
        find_gpu("0xH200")


def test_every_gpu_with_a_speed_has_a_memory() -> None:
    assert set(BF16_TFLOPS) < set(GPUS)
    assert [gpu for gpu in BF16_TFLOPS if Machine(gpu, 1, DISKS["ram"]).is_measured] == ["H200"]
    assert not Machine("H200", 2, DISKS["ram"]).is_measured


def test_hidden_states_that_a_gpu_cannot_hold_are_on_the_host() -> None:
    plan = dense_plan(LLAMA_405B)
    large = forecast_conversion(plan, H200, 128, 2048)
    small = forecast_conversion(plan, Machine("RTX 4090", 1, DISKS["ram"]), 128, 2048)
    assert large.fits and small.fits
    assert small.memory.gpu_bytes == int(0.9 * (24564 << 20)) < large.memory.gpu_bytes
    assert sum(vars(small.memory).values()) == sum(vars(large.memory).values())
    assert not forecast_conversion(plan, Machine("RTX 5060 Ti 16 GB", 1, DISKS["ram"]), 128, 2048).fits


def test_the_cost_is_the_time_of_the_machine() -> None:
    plan = dense_plan(SMALL)
    found = forecast_conversion(plan, H200, 4, 64, usd_per_hour=36.0)
    assert found.cost_usd == pytest.approx(found.times.total_seconds / 100)
    assert forecast_conversion(plan, H200, 4, 64).cost_usd is None


def test_the_document_has_exactly_these_keys_and_is_json() -> None:
    document = as_json(forecast_conversion(dense_plan(SMALL), H200, 4, 64, usd_per_hour=1))
    assert list(json.loads(json.dumps(document, allow_nan=False))) == [
        "gpu", "count", "is_measured", "disk", "network_bytes", "low_disk", "tokens", "read_bytes", "written_bytes",
        "forward_flop", "start_seconds", "read_seconds", "forward_seconds", "quantize_seconds", "write_seconds",
        "copy_seconds", "disk_seconds", "network_seconds", "conversion_seconds", "bound_by", "total_seconds", "memory",
        "fits", "disk_bytes", "cost_usd",
    ]  # fmt: skip
    assert document["total_seconds"] == pytest.approx(document["start_seconds"] + document["conversion_seconds"])
    assert document["tokens"] == 256


def test_headers_in_memory_plan_as_files_do(tmp_path: Path) -> None:
    folder = synthetic_gemma4.write_synthetic_gemma4(tmp_path / "model", layers=6)
    on_disk, in_memory = planned(open_checkpoint(folder)), planned(SOURCES["6 layers"])
    assert (on_disk.tensor_bytes, on_disk.file_bytes) == (in_memory.tensor_bytes, in_memory.file_bytes)
    assert set(on_disk.matrices) == set(in_memory.matrices)
