"""The forecast of a calibration in two lanes."""

from __future__ import annotations

import pytest
from nvquant.checkpoint.source import Checkpoint
from nvquant.format.layouts import LAYOUTS
from nvquant.plan.calibration import calibration_size
from nvquant.plan.forecast import fixed_memory, forecast_memory
from nvquant.plan.machines import DISKS, Machine
from nvquant.plan.plan import Plan, compute_plan
from nvquant.plan.times import forecast_times
from nvquant.plan.two_lanes import SolvedGroup, most_memory, passes, solved_groups
from nvquant.plan.work import measure_work
from nvquant.recipe.load import load_recipe
from support.synthetic_dense import SMOLLM2_135M, headers_only
from support.synthetic_gemma4 import config, tensor_shapes

DOWN = SolvedGroup(rows=5376, cols=21504)  # of Gemma 4 31B


@pytest.fixture(scope="module")
def gemma() -> Checkpoint:
    return headers_only(tensor_shapes(), config())


@pytest.fixture(scope="module")
def smollm2() -> Checkpoint:
    return headers_only(SMOLLM2_135M.shapes(), SMOLLM2_135M.config())


def planned(source: Checkpoint, quantizer: str, recipe: str = "nvfp4-full", **calibration: int) -> Plan:
    chosen = load_recipe(recipe)
    own = chosen.calibration.model_copy(update=calibration)
    return compute_plan(
        source, chosen.model_copy(update={"calibration": own}), LAYOUTS["compressed-tensors"], "model", quantizer
    )


def test_tokens_follow_the_widest_input_where_nobody_chose_them(gemma: Checkpoint, smollm2: Checkpoint) -> None:
    found = calibration_size(planned(gemma, "gptq"), None, None)
    assert (found.samples, found.sequence_length, found.tokens) == (210, 2048, 430_080)
    assert found.tokens >= 20 * 21504 > 209 * 2048
    assert found.words == (
        "210 x 2048 = 430,080 tokens, because gptq needs 20 for each of the 21,504 columns of the widest matrix"
    )
    assert calibration_size(planned(gemma, "gptq"), None, 1024).samples == 420
    assert calibration_size(planned(gemma, "gptq", "nvfp4-a16"), None, None).samples == 210
    assert calibration_size(planned(gemma, "mse"), None, None).words == "128 x 2048 = 262,144 tokens, the default"
    assert calibration_size(planned(smollm2, "gptq"), None, None).samples == 128  # 1,536 columns need less


def test_a_number_of_samples_that_somebody_chose_is_taken(gemma: Checkpoint) -> None:
    by_option = calibration_size(planned(gemma, "gptq", samples=9), 7, None)
    assert (by_option.samples, by_option.reason) == (7, "as --samples gives it")
    by_recipe = calibration_size(planned(gemma, "gptq", samples=9), None, None)
    assert (by_recipe.samples, by_recipe.reason) == (9, "as recipe nvfp4-full gives it")


def test_groups_come_in_the_order_of_the_layer(gemma: Checkpoint) -> None:
    layers = solved_groups(planned(gemma, "gptq"))
    assert len(layers) == 60
    assert layers[0] == [SolvedGroup(16384, 5376), SolvedGroup(5376, 8192), SolvedGroup(43008, 5376), DOWN]
    assert solved_groups(planned(gemma, "gptq", "nvfp4"))[0] == [SolvedGroup(43008, 5376), DOWN]
    assert set(map(tuple, solved_groups(planned(gemma, "mse")).values())) == {()}


def test_memory_of_the_widest_group_is_that_of_its_matrices() -> None:
    square, weight = 21504**2, 5376 * 21504
    assert DOWN.cross_rows == 5376  # the product with the weights is smaller than [cols, cols]
    assert DOWN.memory_bytes == 12 * square + 4 * weight + 16 * weight
    assert DOWN.memory_bytes < 8e9
    assert SolvedGroup(4096, 4096).cross_rows == 4096


def test_both_lanes_go_up_to_each_group() -> None:
    groups = [SolvedGroup(64, 64), SolvedGroup(64, 128)]  # of 8,192 and 16,384 operations
    assert passes(groups, 24576.0) == pytest.approx(4 + 8192 / 24576)
    assert passes([], 24576.0) == 1


def test_memory_counts_both_lanes_and_the_moments(gemma: Checkpoint) -> None:
    one, two = planned(gemma, "mse"), planned(gemma, "gptq")
    layer = max(work.read_bytes for work in measure_work(one, 1, 2048, 1).layers)
    difference = fixed_memory(two, 2048, True).gpu_bytes - fixed_memory(one, 2048, True).gpu_bytes
    assert difference == layer + most_memory(two) == layer + DOWN.memory_bytes
    hidden = 128 * 2048 * 5376 * 2
    assert forecast_memory(one, 128, 2048, 1, True).gpu_bytes == fixed_memory(one, 2048, True).gpu_bytes + hidden
    assert forecast_memory(two, 128, 2048, 1, True).gpu_bytes == fixed_memory(two, 2048, True).gpu_bytes + 2 * hidden
    assert fixed_memory(two, 0, True).gpu_bytes < fixed_memory(two, 2048, True).gpu_bytes


def test_time_counts_the_passes_the_moments_and_the_factors(gemma: Checkpoint) -> None:
    machine = Machine("H200", 1, DISKS["ram"])
    one, two = (
        forecast_times(measure_work(planned(gemma, name), 64, 2048, 1), name, machine) for name in ("mse", "gptq")
    )
    assert two.forward_seconds > 5 * one.forward_seconds
    assert two.quantize_seconds > 10 * one.quantize_seconds
    twice = forecast_times(measure_work(planned(gemma, "gptq"), 128, 2048, 1), "gptq", machine)
    assert twice.forward_seconds == pytest.approx(2 * two.forward_seconds)
    assert twice.quantize_seconds == two.quantize_seconds
    several = forecast_times(
        measure_work(planned(gemma, "gptq"), 64, 2048, 1), "gptq", Machine("H200", 2, DISKS["ram"])
    )
    assert several.forward_seconds == pytest.approx(two.forward_seconds / 2)
    assert several.quantize_seconds == two.quantize_seconds  # every process solves all groups
