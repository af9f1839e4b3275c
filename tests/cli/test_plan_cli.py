"""`nvquant plan --on`: the options reach the forecast, its words are true, and what contradicts is refused."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from nvquant.cli.machine_options import read_machine
from nvquant.plan.machines import DISKS, HUB_BYTES, Machine
from nvquant.plan.times import forecast_times
from nvquant.plan.work import measure_work
from support.commands import Command
from support.conversions import TinyModels, edit_config, planned, random_samples, write_ids
from support.synthetic_gemma4 import write_synthetic_gemma4
from support.tiny_hybrids import tiny_experts
from support.tiny_models import tiny_llama


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_synthetic_gemma4(tmp_path_factory.mktemp("models") / "gemma-4-31b")


def time_of(nvquant: Command, *options: object) -> dict[str, Any]:
    ended = nvquant("plan", *options, "--json")
    assert ended.code == 0, ended.stderr
    found: dict[str, Any] = json.loads(ended.stdout)["time"]
    return found


def test_without_a_machine_no_time_is_forecast(nvquant: Command, tiny: TinyModels) -> None:
    ended = nvquant("plan", tiny("llama"))
    assert "Forecast" not in ended.stdout
    assert "Conversion needs up to" in ended.stdout
    assert json.loads(nvquant("plan", tiny("llama"), "--json").stdout)["time"] is None


def test_the_document_is_the_forecast_of_what_was_asked_for(nvquant: Command, tiny: TinyModels) -> None:
    sizes = ("--samples", 8, "--sequence-length", 128, "--batch-size", 2)
    found = time_of(nvquant, tiny("gemma4"), "--on", "2xL40S", "--disk", "ram", "--price", "3.6", *sizes)
    work = measure_work(planned(tiny("gemma4"), "nvfp4"), 8, 128, 2)
    times = forecast_times(work, "mse", Machine("L40S", 2, DISKS["ram"]))
    assert found["conversion_seconds"] == pytest.approx(times.conversion_seconds, abs=1e-3)
    assert (found["gpu"], found["count"], found["is_measured"], found["tokens"]) == ("L40S", 2, False, 1024)
    assert found["cost_usd"] == pytest.approx(found["total_seconds"] / 1000, abs=1e-4)


def test_the_quantizer_decides_whether_and_on_how_much_text_a_plan_calibrates(nvquant: Command, model: Path) -> None:
    words = {
        name: nvquant("plan", model, "--recipe", "nvfp4-a16", "--quantizer", name).stdout for name in ("mse", "gptq")
    }
    assert "Calibration takes" not in words["mse"]
    assert (
        "Calibration takes 210 x 2048 = 430,080 tokens, because gptq needs 20 for each of the 21,504 columns of the "
        "widest matrix.\n"
    ) in words["gptq"]
    found = json.loads(nvquant("plan", model, "--quantizer", "gptq", "--samples", 3, "--json").stdout)["calibration"]
    assert found == {"samples": 3, "sequence_length": 2048, "reason": "as --samples gives it"}
    timed = nvquant("plan", model, "--quantizer", "gptq", "--on", "H200").stdout
    assert "tokens, gptq:" in timed and "The time of gptq assumes rates in float32 that are not measured." in timed
    assert "not measured" not in nvquant("plan", model, "--on", "H200").stdout


def test_words_say_stages_memory_disk_and_cost(nvquant: Command, model: Path) -> None:
    ended = nvquant("plan", model, "--on", "H200", "--disk", "1.7GB/s", "--price", "3.50")
    assert ended.code == 0, ended.stderr
    document = time_of(nvquant, model, "--on", "H200", "--disk", "1.7GB/s", "--price", "3.50")
    text = ended.stdout
    assert (
        "Forecast on 1 x H200, the source on the disk (reads 1.7 GB/s, writes 1.7 GB/s), 128 x 2048 tokens, mse:"
    ) in text
    rows = dict(re.findall(r"^ *(\w[^\n\d]*?) {2,}([\d.]+)$", text.partition("Forecast")[2], re.MULTILINE))
    keys = {
        "start of the process": "start_seconds",
        "reading the layers": "read_seconds",
        "forward": "forward_seconds",
        "quantizing": "quantize_seconds",
        "writing the layers": "write_seconds",
        "copying the rest": "copy_seconds",
        "the disk, for all of them": "disk_seconds",
        "total": "total_seconds",
    }
    assert set(rows) == set(keys)
    assert all(float(rows[name]) == pytest.approx(document[key], abs=0.051) for name, key in keys.items())
    assert f"The longest part is the disk. At 3.5 USD an hour it costs {document['cost_usd']:.2f} USD." in text
    assert f"and {document['disk_bytes'] / 1e9:.2f} GB of disk." in text
    assert "not measured" not in text
    assert "Conversion needs up to" not in text, "the machine's own memory is told instead"


def test_the_31b_at_full_size_is_exact_in_bytes_and_operations(nvquant: Command, model: Path) -> None:
    found = time_of(nvquant, model, "--on", "H200")
    assert found["read_bytes"] == 62_546_177_752
    assert found["written_bytes"] > 32_633_255_032
    assert found["forward_flop"] == 128 * (2048 * 2 * 29_286_727_680 + 50 * 51_556_384_768 + 10 * 137_506_062_336)


@pytest.mark.parametrize(
    ("on", "words"),
    [
        (
            "RTX 4090",
            "It scales the runs of an H200 by the published BF16 rates (165.2 and 989.4",
        ),
        ("8xH100", "Runs of several processes were not measured."),
        ("2xH200", "This forecast is not measured. Its constants come from runs of one process."),
    ],
)
def test_what_was_not_measured_is_said(nvquant: Command, tiny: TinyModels, on: str, words: str) -> None:
    assert words in nvquant("plan", tiny("llama"), "--on", on).stdout


def test_a_gpu_that_cannot_hold_the_layers_is_said_not_to_fit(nvquant: Command, model: Path) -> None:
    sizes = ("--sequence-length", 65536)
    assert "It does not fit: one RTX 5060 Ti" in nvquant("plan", model, "--on", "RTX 5060 Ti", *sizes).stdout
    assert "It does not fit" not in nvquant("plan", model, "--on", "H200", *sizes).stdout


def test_a_source_from_the_hub_is_kept_or_not(nvquant: Command, model: Path) -> None:
    hub = ("--on", "H200", "--network", "400MB/s")
    whole, ranges = time_of(nvquant, model, *hub), time_of(nvquant, model, *hub, "--low-disk")
    assert whole["network_bytes"] == ranges["network_bytes"] == 400e6
    assert whole["disk_bytes"] > whole["read_bytes"] + whole["written_bytes"]
    assert ranges["disk_bytes"] == whole["written_bytes"] + 2 * 262144 * 5376 + 2 * 5376
    words = nvquant("plan", model, *hub, "--low-disk").stdout
    assert "the source from the Hub at 0.4 GB/s, by ranges, output on the disk nvme" in words


def test_on_a_cpu_no_gpu_memory_is_needed(nvquant: Command, tiny: TinyModels) -> None:
    found = time_of(nvquant, tiny("llama"), "--on", "cpu", "--no-gpu")
    assert found["gpu"] is None
    assert found["memory"]["gpu_bytes"] == 0


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--on", "RTX 3080"), "--on RTX 3080: nvquant does not know this machine: choose RTX 5060 Ti 16 GB, RTX 4090"),
        (("--price", "3"), "--price affects only the forecast of a machine. Name the machine with --on."),
        (("--disk", "ram"), "--disk affects only the forecast of a machine"),
        (("--network", "1GB/s"), "--network affects only the forecast of a machine"),
        (("--low-disk",), "--low-disk affects only the forecast of a machine"),
        (
            ("--on", "H200", "--low-disk"),
            "--low-disk works only for models on the Hub. Give their rate with --network too.",
        ),
        (("--on", "2xH200", "--low-disk", "--network", "1GB/s"), "every rank would fetch the whole model"),
        (
            ("--on", "H200", "--disk", "floppy"),
            "'floppy' is not a disk. Write ram, nvme, network, or a rate such as 1.7GB/s.",
        ),
        (("--on", "H200", "--disk", "0GB/s"), "'0GB/s' is not a disk"),
        (("--on", "H200", "--network", "fast"), "'fast' is not a rate. Write it as 1.7GB/s or 100MB/s."),
        (("--on", "H200", "--no-gpu"), "--no-gpu and --on H200 contradict each other. Drop one of them."),
        (("--on", "H200", "--price", "-1"), "Invalid value for '--price'"),
    ],
)
def test_what_contradicts_or_means_nothing_is_refused(
    nvquant: Command, tiny: TinyModels, options: tuple[str, ...], sentence: str
) -> None:
    ended = nvquant("plan", tiny("llama"), *options)
    assert ended.code == 2
    assert sentence in " ".join(ended.stderr.split())
    assert ended.stdout == ""


def test_of_a_model_on_the_hub_a_rate_is_assumed_where_none_is_given() -> None:
    assumed = read_machine("H200", None, None, True, None, from_hub=True)
    assert assumed == Machine("H200", 1, DISKS["nvme"], HUB_BYTES, low_disk=True)
    given = read_machine("H200", None, 5e8, False, None, from_hub=True)
    assert given == Machine("H200", 1, DISKS["nvme"], 5e8)
    assert read_machine(None, None, None, False, None, from_hub=True) is None


def outcomes(nvquant: Command, model: Path, recipe: object, folder: Path) -> list[tuple[int, str]]:
    """Exit code and error of plan and of convert."""
    folder.mkdir(exist_ok=True)
    ids = write_ids(folder / "ids.jsonl", random_samples((12, 12)))
    calibration = ("--calibration", ids, "--samples", 2, "--sequence-length", 12, "--device", "cpu")
    planned = nvquant("plan", model, "--recipe", recipe)
    done = nvquant("convert", model, "--recipe", recipe, "-o", folder / "out", *calibration)
    return [
        (ended.code, next((line for line in ended.stderr.splitlines() if line.startswith("Error:")), ""))
        for ended in (planned, done)
    ]


def test_a_hint_that_does_not_fit_the_model_says_nothing(nvquant: Command, tmp_path: Path) -> None:
    """The attention's o_proj has 40 columns, which nvfp4-full refuses and nvfp4 leaves alone."""
    model = tiny_llama(tmp_path / "model", head_dim=10)
    assert outcomes(nvquant, model, "nvfp4", tmp_path) == [(0, ""), (0, "")]
    assert "nvfp4-full" not in nvquant("plan", model, "--recipe", "nvfp4").stdout


def test_plan_speaks_of_no_other_recipe_than_the_one_asked_for(nvquant: Command, tmp_path: Path) -> None:
    model = tiny_experts(tmp_path / "model", "qwen3")
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("name: mine\nexperts: bf16\nquantize:\n  - modules: [attention]\n    scheme: nvfp4\n")
    assert outcomes(nvquant, model, recipe, tmp_path) == [(0, ""), (0, "")]
    planned, done = outcomes(nvquant, model, "nvfp4-full", tmp_path / "b")
    assert planned == done
    assert planned[0] == 2 and "mixture of experts" in planned[1]


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"hidden_act": "no such function"}, 3, "cannot build LlamaForCausalLM"),
        ({"architectures": ["UnheardOfForCausalLM"]}, 3, "does not know the architecture UnheardOfForCausalLM"),
        ({"intermediate_size": 96}, 2, "use the config and weights of one model"),
        ({"num_hidden_layers": 2}, 2, "describes fewer decoder layers"),
        ({"num_hidden_layers": 4}, 2, r"lacks model.layers.3."),
    ],
)
def test_plan_refuses_what_convert_refuses(
    nvquant: Command, tmp_path: Path, changes: dict[str, Any], code: int, words: str
) -> None:
    model = edit_config(tiny_llama(tmp_path / "model"), **changes)
    planned, done = outcomes(nvquant, model, "nvfp4", tmp_path)
    assert planned == done
    assert planned[0] == code and words in planned[1]


def test_a_package_that_calibration_on_text_requires_is_named(
    nvquant: Command, tiny: TinyModels, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(tiny("llama"), tmp_path / "model"))
    for path in model.glob("tokenizer*"):
        path.unlink()
    (model / "tekken.json").write_text("{}")
    assert (
        "Calibration on text requires mistral-common: run `pip install mistral-common`."
        in nvquant("plan", model).stdout
    )
    assert json.loads(nvquant("plan", model, "--json").stdout)["missing_packages"] == ["mistral-common"]
    assert json.loads(nvquant("plan", model, "--recipe", "nvfp4-a16", "--json").stdout)["missing_packages"] == []
