"""The stage `serve` with a real vLLM: good checkpoints pass it, and each broken one fails the check that can see it.

Random tiny models start as fast as a server can and know no text, which the stage is told (`SourceFigures`); what is
said of text is tested on SmolLM2. The judge of likelihoods is the tests' own emulation, which shares no code with the
package.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from nvquant.checkpoint.source import open_checkpoint
from nvquant.convert.options import ConvertOptions
from nvquant.convert.pipeline import convert
from nvquant.errors import InputError
from nvquant.format.layouts import LAYOUTS
from nvquant.plan.plan import compute_plan
from nvquant.recipe.load import load_recipe
from nvquant.serving.kernels import Arithmetic
from nvquant.serving.server import NO_LOAD_CHECK, ServeOptions, serving
from nvquant.verify import served_answers
from nvquant.verify.numerics.text import reference_ids
from nvquant.verify.report import Check
from nvquant.verify.serve import ServeStage, serve_checks
from nvquant.verify.served_logprobs import SourceFigures
from nvquant.verify.subject import open_subject
from safetensors.torch import load_file, save_file
from support.emulation import load_emulation, token_logprobs
from support.tiny_models import tiny_gemma4_text, tiny_llama
from support.tiny_tokenizer import write_tiny_tokenizer
from support.vllm_server import small_options, vllm_python
from verify.checkpoints import token_ids

pytestmark = pytest.mark.vllm

ALL = ["start", "kernel", "memory", "tokens", "answers", "degeneration", "logprobs"]
# Nats a token of a model that guesses among 512; text cannot be asked of it.
GUESSING = SourceFigures(math.log(512))


@pytest.fixture(scope="module", autouse=True)
def _vllm() -> None:
    vllm_python()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("served")


@pytest.fixture(scope="module")
def tiny(made: Path) -> Path:
    """A random Llama in W4A4, with head sizes that a server's attention takes."""
    source = tiny_llama(
        made / "llama", hidden_size=256, head_dim=64, intermediate_size=512, max_position_embeddings=512
    )
    return convert_tiny(source, "compressed-tensors", "nvfp4-full", made / "tiny-nvfp4")


@pytest.fixture(scope="module")
def smollm2_full(converted_smollm2: Callable[[str, str], Path]) -> Path:
    return converted_smollm2("nvfp4-full", "compressed-tensors")


@pytest.fixture
def short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter of the tokens, which a CPU takes minutes for, where a good checkpoint's are not the matter."""
    monkeypatch.setattr(served_answers, "LONG_TOKENS", 96)


@pytest.fixture
def broken(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint that a test may damage."""
    return Path(shutil.copytree(tiny, tmp_path / "broken"))


def convert_tiny(source: Path, layout: str, recipe: str, output: Path) -> Path:
    plan = compute_plan(open_checkpoint(source), load_recipe(recipe), LAYOUTS[layout], source.name)
    samples = token_ids(plan.source, source.parent) if plan.needs_calibration else None
    convert(plan, ConvertOptions(output, "rtn"), samples)
    return output


def emulation_of(checkpoint: Path) -> Callable[[list[int], str], list[float]]:
    return lambda ids, arithmetic: token_logprobs(load_emulation(checkpoint), ids)


def stage(
    checkpoint: Path,
    folder: Path,
    ids: Sequence[int] | None = None,
    source: SourceFigures | None = None,
    options: ServeOptions | None = None,
) -> ServeStage:
    subject = open_subject(checkpoint)
    chosen = small_options() if options is None else options
    return ServeStage(subject, chosen, emulation_of(checkpoint), ids, folder, lambda _: None, source)


def verdicts(checks: list[Check]) -> dict[str, bool]:
    return {check.name: check.passed for check in checks}


def only_fault(checks: list[Check], name: str) -> str:
    """The one fault of the one check that failed."""
    assert [check.name for check in checks if not check.passed] == [name]
    (fault,) = next(check for check in checks if not check.passed).finding.faults
    return fault


def random_ids(count: int) -> list[int]:
    return [1, *torch.randint(10, 500, (count - 1,), generator=torch.Generator().manual_seed(0)).tolist()]


@pytest.mark.parametrize("long_tokens", [48, pytest.param(256, marks=pytest.mark.thorough)])
def test_a_good_checkpoint_passes_and_everything_is_documented(
    smollm2_full: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, long_tokens: int
) -> None:
    assert served_answers.LONG_TOKENS == 256
    monkeypatch.setattr(served_answers, "LONG_TOKENS", long_tokens)  # of a CPU, 256 take minutes
    monkeypatch.setattr(served_answers, "LONG_SECONDS", 3600.0)  # busy cores shorten no answer here
    ids = reference_ids(smollm2_full, json.loads((smollm2_full / "config.json").read_text()))
    run = stage(smollm2_full, tmp_path, ids, options=small_options(1024))
    emulate = run._emulate
    served_meanwhile: list[list[int]] = []

    def emulate_and_look(ids: list[int], arithmetic: Arithmetic) -> list[float]:
        assert emulate is not None and run._server is not None and run._server.process is not None
        served_meanwhile.append(run._server.process.pids())
        return emulate(ids, arithmetic)

    run._emulate = emulate_and_look
    checks = list(run.run())
    assert served_meanwhile == [[]]  # the server has ended, and its GPU memory is free for the emulation
    assert verdicts(checks) == dict.fromkeys(ALL, True), [check.detail for check in checks]
    assert {check.stage for check in checks} == {"serve"}
    document = json.loads(json.dumps(run.document))
    assert document["server"]["vllm"] == "0.32.0"
    assert "enable_weights_track" in document["server"]["command"]
    assert document["kernel"]["class"] == "CpuNvFp4LinearKernel"
    assert document["kernel"]["arithmetic"] == "w4a4"
    assert "nvquant's plugin for the CPU" in document["kernel"]["words"]
    assert document["memory"]["forecast_bytes"] == sum(
        info.nbytes for info in open_subject(smollm2_full).infos.values()
    )
    assert document["memory"]["kv_tokens"] > 10_000
    assert {answer["endpoint"] for answer in document["answers"]} == {"completions", "chat"}
    long = [answer for answer in document["answers"] if answer["prompt"] in served_answers.LONG_PROMPTS]
    assert len(long) == len(served_answers.LONG_PROMPTS)
    assert all(answer["tokens"] == long_tokens or answer["finish_reason"] == "stop" for answer in long)
    assert document["logprobs"]["tokens"] == len(ids) - 1
    assert abs(document["logprobs"]["nll_served"] - document["logprobs"]["nll_emulated"]) < 0.15
    assert document["decode_tokens_per_second"] > 0
    assert (tmp_path / "vllm.log").is_file()


@pytest.mark.thorough
@pytest.mark.usefixtures("short_answers")
def test_scales_that_were_not_inverted_are_heard_in_what_it_says(smollm2_full: Path, tmp_path: Path) -> None:
    """vLLM loads it without a word; structure sees it, and so does whoever reads the answers."""
    checkpoint = Path(shutil.copytree(smollm2_full, tmp_path / "inverted"))
    for shard in checkpoint.glob("*.safetensors"):
        tensors = load_file(shard)
        for name in tensors:
            if name.endswith("weight_global_scale"):
                tensors[name] = 1 / tensors[name]
        save_file(tensors, shard, metadata={"format": "pt"})
    ids = reference_ids(checkpoint, json.loads((checkpoint / "config.json").read_text()))
    checks = list(stage(checkpoint, tmp_path, ids, options=small_options(1024)).run())
    failed = {check.name: check.finding.faults for check in checks if not check.passed}
    assert "damaged or untrained" in failed["logprobs"][0]
    assert {"degeneration"} <= set(failed), [check.detail for check in checks]


@pytest.mark.thorough
def test_the_tokenizer_of_another_model_is_found_by_the_likelihood_of_text(smollm2_full: Path, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(smollm2_full, tmp_path / "other"))
    write_tiny_tokenizer(checkpoint, "smollm2")
    ids = reference_ids(checkpoint, json.loads((checkpoint / "config.json").read_text()))
    checks = []
    for check in stage(checkpoint, tmp_path, ids, options=small_options(1024)).run():
        checks.append(check)
        if check.name == "logprobs":
            break
    assert not verdicts(checks)["logprobs"]
    fault = next(check for check in checks if check.name == "logprobs").finding.faults[0]
    assert "tokenizer belongs to another model" in fault


def test_a_larger_tokenizer_is_found_before_it_kills_the_server(broken: Path, smollm2: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(smollm2 / name, broken / name)
    checks = []
    for check in stage(broken, tmp_path, None, GUESSING).run():
        checks.append(check)
        if check.name == "tokens":
            break
    assert only_fault(checks, "tokens") == "the tokenizer has 49,152 tokens, the model 512: it belongs to another model"


@pytest.mark.thorough
def test_a_random_model_passes_where_its_source_knows_no_text_either(tiny: Path, tmp_path: Path) -> None:
    run = stage(tiny, tmp_path, random_ids(300), GUESSING)
    checks = list(run.run())
    assert verdicts(checks) == dict.fromkeys(ALL, True), [check.detail for check in checks]
    degeneration = next(check for check in checks if check.name == "degeneration")
    assert degeneration.finding.looked_at.startswith("not applicable: the source itself models no text")


@pytest.mark.thorough  # test_served_logprobs.py has the limits
def test_likelihoods_of_another_file_are_noticed(tiny: Path, tmp_path: Path) -> None:
    """The server computes what it loaded; here the judge is asked of weights that are half as large."""
    subject = open_subject(tiny)

    def of_other_weights(ids: list[int], arithmetic: str) -> list[float]:
        model = load_emulation(tiny)
        with torch.no_grad():
            model.model.norm.weight.mul_(4)
        return token_logprobs(model, ids)

    run = ServeStage(subject, small_options(), of_other_weights, random_ids(300), tmp_path, lambda _: None, GUESSING)
    failed = [check for check in run.run() if check.name == "logprobs"]
    assert "the server's results do not match the files" in failed[0].finding.faults[0]


def test_a_base_model_served_without_bos_is_found(made: Path, tmp_path: Path) -> None:
    source = tiny_gemma4_text(made / "gemma", base=True, max_position_embeddings=512)
    checkpoint = convert_tiny(source, "compressed-tensors", "nvfp4-full", tmp_path / "gemma-nvfp4")
    checks = []
    for check in stage(checkpoint, tmp_path, None, GUESSING).run():
        checks.append(check)
        if check.name == "tokens":
            break
    assert only_fault(checks, "tokens").startswith("plain text is served without BOS (2), which the model needs")


@pytest.mark.thorough
def test_weight_only_in_the_modelopt_layout_is_served_without_the_load_check_and_says_so(
    made: Path, tiny: Path, tmp_path: Path
) -> None:
    checkpoint = convert_tiny(made / "llama", "modelopt", "nvfp4-a16", tmp_path / "a16")
    run = stage(checkpoint, tmp_path, random_ids(300), GUESSING)
    checks = list(run.run())
    assert verdicts(checks)["logprobs"] and verdicts(checks)["kernel"]
    assert run.document["kernel"]["arithmetic"] == "weight_only"
    assert run.document["hints"] == [NO_LOAD_CHECK]


def test_a_server_that_is_killed_is_a_failed_check_with_its_cause(tiny: Path, tmp_path: Path) -> None:
    run = stage(tiny, tmp_path, random_ids(300), GUESSING)
    checks = []
    for check in run.run():
        checks.append(check)
        if check.name == "memory":
            server = run._server
            assert server is not None and server.process is not None
            for pid in server.process.pids():
                os.kill(pid, signal.SIGKILL)
    assert [check.name for check in checks] == ["start", "kernel", "memory", "tokens"]
    assert only_fault(checks, "tokens").startswith("vLLM ended during a request: ended by SIGKILL")


@pytest.mark.thorough
def test_a_server_that_runs_already_is_held_against_each_arithmetic(tiny: Path, tmp_path: Path) -> None:
    with serving(tiny, small_options(), tmp_path, lambda _: None) as server:
        options = ServeOptions(url=server.url, max_model_len=small_options().max_model_len)
        run = stage(tiny, tmp_path, random_ids(300), GUESSING, options)
        checks = list(run.run())
        assert server.process is not None and server.process.pids()  # it was not ours to end
    assert verdicts(checks) == dict.fromkeys(ALL, True), [check.detail for check in checks]
    assert run.document["logprobs"]["arithmetic"] == "w4a4"
    assert run.document["kernel"]["words"] == "unknown (its likelihoods match W4A4)"


def failed_start(checkpoint: Path, folder: Path) -> tuple[str, ...]:
    """The faults of a start that failed, which ends the stage."""
    run = stage(checkpoint, folder)
    (check,) = list(run.run())
    assert (check.name, check.passed) == ("start", False)
    assert json.loads(json.dumps(run.document))["answers"] == []
    return tuple(check.finding.faults)


@pytest.mark.thorough
def test_a_tensor_that_the_index_names_and_no_shard_has(broken: Path, tmp_path: Path) -> None:
    remove_tensor(broken, "model.norm.weight", keep_entry=True)
    assert "{'model.norm.weight'}" in failed_start(broken, tmp_path)[0]


@pytest.mark.thorough  # tests/e2e has the like
def test_a_missing_scale_of_a_layer_that_is_not_fused(broken: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.down_proj.weight_scale"
    remove_tensor(broken, name, keep_entry=False)
    fault = failed_start(broken, tmp_path)[0]
    assert fault.startswith("vLLM stopped while preparing weights: ValueError: Following weights were not initialized")
    assert name in fault and "write or download it again" in fault


@pytest.mark.thorough
def test_a_truncated_last_shard_is_named(broken: Path, tmp_path: Path) -> None:
    last = sorted(broken.glob("*.safetensors"))[-1]
    last.write_bytes(last.read_bytes()[:-1000])
    server, file = failed_start(broken, tmp_path)
    assert "SafetensorError" in server and "cut off" in server
    assert last.name in file


@pytest.mark.thorough  # the stage structure sees it first
def test_an_ignore_list_that_names_a_part_of_a_fused_layer(broken: Path, tmp_path: Path) -> None:
    config = json.loads((broken / "config.json").read_text())
    config["quantization_config"]["ignore"].append("model.layers.0.self_attn.q_proj")
    (broken / "config.json").write_text(json.dumps(config))
    fault = failed_start(broken, tmp_path)[0]
    assert "model.layers.0.self_attn.qkv_proj" in fault and "ignore list" in fault


def test_a_command_that_does_not_exist_is_refused(tiny: Path, tmp_path: Path) -> None:
    options = ServeOptions(vllm="/no/such/vllm")
    with pytest.raises(InputError, match="does not exist or is not executable"):
        list(serve_checks(open_subject(tiny), options, None, None, tmp_path, lambda _: None))


def remove_tensor(checkpoint: Path, name: str, *, keep_entry: bool) -> None:
    path = checkpoint / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    shard = checkpoint / index["weight_map"][name]
    if not keep_entry:
        del index["weight_map"][name]
        path.write_text(json.dumps(index))
    tensors = load_file(shard)
    del tensors[name]
    save_file(tensors, shard, metadata={"format": "pt"})
