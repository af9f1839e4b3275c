"""Converted checkpoints, served by a real vLLM, give the likelihoods that an independent float32 emulation gives.

The numbers behind the tolerances: W4A4 is chaotic, since one input that rounds the other way changes all that follows.
Token by token two right implementations differ by 0.4 to 0.6 nat, but their means over a few hundred tokens by less
than 0.1, and their correlation stays near 0.97. Weight-only differs by the rounding of BF16 alone. The emulation reads
the same file as the server, so a wrong conversion shows only against the source: SmolLM2 is 0.17 (weight-only), 0.18 to
0.24 (W4A4, MLP) and 0.34 nat (W4A4, all) above it, with correlations of 0.97, 0.96 and 0.94.

Servers start on one core: with pytest-xdist, `-n 2` runs them in pairs. Each checkpoint is made once for all processes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from statistics import mean

import pytest
import transformers
from nvquant.serving.server import NO_LOAD_CHECK, ServerDied
from safetensors.torch import load_file, save_file
from support.converting import run_convert
from support.emulation import load_emulation, token_logprobs
from support.likelihoods import assert_close, sample_ids, sharpen
from support.tiny_models import tiny_gemma4_text
from support.vllm_server import kernel_of, serve, vllm_python

pytestmark = pytest.mark.vllm

Convert = Callable[..., Path]

W4A4_KERNEL, WEIGHT_ONLY_KERNEL = "CpuNvFp4LinearKernel", "CpuNvFp4WeightOnlyLinearKernel"

# As `nvquant sweep` writes it: some layers of a projection in each scheme, and some in none. Layer 5 has no v_proj.
BY_LAYER = r"""
name: by-layer
quantize:
- modules:
  - re:model\.layers\.(0|1|2|3|4)\.self_attn\.(q|k|v)_proj$
  - re:model\.layers\.(1|2)\.mlp\.(gate|up)_proj$
  scheme: fp8
- modules:
  - re:model\.layers\.5\.self_attn\.(q|k)_proj$
  - re:model\.layers\.\d+\.mlp\.down_proj$
  - re:model\.layers\.(0|4|5)\.mlp\.(gate|up)_proj$
  - re:model\.layers\.(2|3)\.self_attn\.o_proj$
  scheme: nvfp4
"""
PROMPT = """\
The harbour of the old town faces north, and for most of the winter its water lies in the shadow of the cliffs. Fishing
boats leave before sunrise and come back in the early afternoon, when the light is already fading. In summer everything
changes. Ferries bring visitors from the mainland, the market on the quay stays open until nine in the evening, and
children jump from the wall into the sea while their parents watch from the cafés.

The lighthouse at the end of the pier was built in 1874, after a storm had driven three ships onto the rocks in a single
night. It is made of granite blocks that were cut in a quarry twenty kilometres inland and carried to the coast by rail.
For almost a century a keeper lived in the two small rooms below the lamp, and his duty was to light it at dusk, to wind
the clockwork that turned the lens, and to write down the weather every three hours. Since 1969 the lamp has been
electric and the rooms have been empty, but the notebooks are kept in the town museum, where anyone may read them.
"""


@pytest.fixture(scope="session")
def vllm_environment() -> Path:
    return vllm_python()


@pytest.fixture(scope="session")
def prompt_ids(smollm2: Path) -> list[int]:
    ids: list[int] = transformers.AutoTokenizer.from_pretrained(smollm2)(PROMPT.replace("\n", " ")).input_ids
    assert len(ids) > 200
    return ids


@pytest.fixture(scope="session")
def source_logprobs(smollm2: Path, prompt_ids: list[int]) -> list[float]:
    return token_logprobs(load_emulation(smollm2), prompt_ids)


@pytest.mark.parametrize(
    ("recipe", "layout"),
    [
        ("nvfp4", "modelopt"),
        pytest.param("nvfp4", "compressed-tensors", marks=pytest.mark.thorough),
        pytest.param("nvfp4-full", "modelopt", marks=pytest.mark.thorough),
        pytest.param("nvfp4-full", "compressed-tensors", marks=pytest.mark.thorough),  # verify/test_serve.py has it
        ("nvfp4-fp8", "compressed-tensors"),
        pytest.param("nvfp4-fp8", "modelopt", marks=pytest.mark.thorough),
    ],
)
@pytest.mark.usefixtures("vllm_environment")
def test_served_w4a4_gives_the_likelihood_of_the_emulation(
    converted_smollm2: Convert,
    prompt_ids: list[int],
    source_logprobs: list[float],
    tmp_path: Path,
    recipe: str,
    layout: str,
) -> None:
    checkpoint = converted_smollm2(recipe, layout)
    with serve(checkpoint, tmp_path) as server:
        served = server.client.prompt_logprobs(prompt_ids)
    # Which FP8 kernel it is depends on the processor.
    assert {kernel.name for kernel in server.facts.kernels if not kernel.is_fp8} == {W4A4_KERNEL}
    assert {kernel.arithmetic for kernel in server.facts.kernels if kernel.is_fp8} == (
        {"w8a8"} if recipe == "nvfp4-fp8" else set()
    )
    assert_close(served, token_logprobs(load_emulation(checkpoint), prompt_ids))
    assert_close(served, source_logprobs, nll=0.6)


@pytest.mark.parametrize("layout", ["compressed-tensors", pytest.param("modelopt", marks=pytest.mark.thorough)])
@pytest.mark.usefixtures("vllm_environment")
def test_a_served_checkpoint_of_folds_and_gptq_gives_the_likelihood_of_the_emulation(
    converted_smollm2: Convert, prompt_ids: list[int], source_logprobs: list[float], tmp_path: Path, layout: str
) -> None:
    checkpoint = converted_smollm2("nvfp4-full", layout, "gptq")
    assert json.loads((checkpoint / "nvquant_manifest.json").read_text())["fold"] == "auto"
    with serve(checkpoint, tmp_path) as server:
        served = server.client.prompt_logprobs(prompt_ids)
    assert_close(served, token_logprobs(load_emulation(checkpoint), prompt_ids))
    assert_close(served, source_logprobs, nll=0.6)


@pytest.mark.parametrize("layout", ["compressed-tensors", pytest.param("modelopt", marks=pytest.mark.thorough)])
@pytest.mark.usefixtures("vllm_environment")
def test_served_weight_only_gives_each_token_the_likelihood_of_the_emulation(
    converted_smollm2: Convert, prompt_ids: list[int], source_logprobs: list[float], tmp_path: Path, layout: str
) -> None:
    checkpoint = converted_smollm2("nvfp4-a16", layout)
    with serve(checkpoint, tmp_path) as server:
        served = server.client.prompt_logprobs(prompt_ids)
        answer = server.client.complete("The capital of Italy is Rome. The capital of France is", max_tokens=1)
    assert kernel_of(server) == WEIGHT_ONLY_KERNEL
    # vLLM makes room for an input scale in every modelopt layer, weight-only or not, and its check then misses it.
    assert server.notes == ([NO_LOAD_CHECK] if layout == "modelopt" else [])
    assert answer.text == " Paris"
    emulated = token_logprobs(load_emulation(checkpoint), prompt_ids)
    differences = [abs(got - expected) for got, expected in zip(served, emulated, strict=True)]
    assert mean(differences) < 0.1
    assert max(differences) < 0.5
    assert_close(served, source_logprobs, nll=0.3, least_correlation=0.95)


@pytest.mark.parametrize(
    ("head", "layout"),
    [
        ("fp8", "modelopt"),
        ("nvfp4", "compressed-tensors"),
        pytest.param("fp8", "compressed-tensors", marks=pytest.mark.thorough),
        pytest.param("nvfp4", "modelopt", marks=pytest.mark.thorough),
    ],
)
@pytest.mark.usefixtures("vllm_environment")
def test_a_served_quantized_head_gives_each_token_the_likelihood_of_the_emulation(
    smollm2: Path, prompt_ids: list[int], source_logprobs: list[float], tmp_path: Path, head: str, layout: str
) -> None:
    recipe = tmp_path / "head.yaml"
    recipe.write_text(f"name: head\nquantize: [{{modules: [mlp], scheme: nvfp4-a16}}]\nhead: {head}\n")
    checkpoint = run_convert(smollm2, str(recipe), layout, tmp_path / "converted")
    with serve(checkpoint, tmp_path) as server:
        served = server.client.prompt_logprobs(prompt_ids)
    assert any(kernel.is_fp8 for kernel in server.facts.kernels) == (head == "fp8")
    emulated = token_logprobs(load_emulation(checkpoint), prompt_ids)
    differences = [abs(got - expected) for got, expected in zip(served, emulated, strict=True)]
    assert mean(differences) < 0.1
    # Rounding the head's inputs to FP8 turns the noise of BF16 into larger steps: in the emulation alone, BF16 outputs
    # of every module change a token by up to 0.47 nat (mean 0.060) with it, and by 0.12 (mean 0.026) without.
    assert max(differences) < (1.0 if head == "fp8" else 0.5)
    assert_close(served, source_logprobs, nll=0.3, least_correlation=0.95)


KV_RECIPE = """\
name: cached
quantize: [{modules: [mlp], scheme: nvfp4-a16}]
kv_cache: {dtype: fp8-calibrated}
calibration: {samples: 4, sequence_length: 256}
"""


def with_large_values(source: Path, folder: Path) -> Path:
    """The same function through values that are 1024 times as large, which an FP8 cache clips under unit scales."""
    shutil.copytree(source, folder)
    for shard in folder.glob("*.safetensors"):
        tensors = load_file(shard)
        for name in tensors:
            if name.endswith("v_proj.weight"):
                tensors[name] *= 1024
            elif name.endswith("o_proj.weight"):
                tensors[name] /= 1024
        save_file(tensors, shard, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("layout", ["compressed-tensors", pytest.param("modelopt", marks=pytest.mark.thorough)])
@pytest.mark.usefixtures("vllm_environment")
def test_a_server_takes_the_scales_of_the_kv_cache(
    smollm2: Path, prompt_ids: list[int], source_logprobs: list[float], tmp_path: Path, layout: str
) -> None:
    """On a shorter text, the mean is 3.896 nats with a BF16 cache and with these scales, and 6.960 with unit scales."""
    recipe = tmp_path / "cached.yaml"
    recipe.write_text(KV_RECIPE)
    source = with_large_values(smollm2, tmp_path / "source")
    checkpoint = run_convert(source, str(recipe), layout, tmp_path / "converted")
    with serve(checkpoint, tmp_path) as server:
        served = server.client.prompt_logprobs(prompt_ids)
    emulated = token_logprobs(load_emulation(checkpoint), prompt_ids)
    differences = [abs(got - expected) for got, expected in zip(served, emulated, strict=True)]
    assert mean(differences) < 0.3  # 0.17 on the shorter text, 0.05 with a BF16 cache, 3.2 with unit scales
    assert_close(served, source_logprobs, nll=0.3, least_correlation=0.95)


@pytest.mark.parametrize(
    ("recipe", "layout"),
    [
        ("nvfp4-full", "compressed-tensors"),
        ("nvfp4-fp8", "modelopt"),
        pytest.param("nvfp4-fp8", "compressed-tensors", marks=pytest.mark.thorough),
        (BY_LAYER, "compressed-tensors"),
        pytest.param(BY_LAYER, "modelopt", marks=pytest.mark.thorough),
    ],
)
@pytest.mark.usefixtures("vllm_environment")
def test_served_gemma4_with_shared_keys_and_values_gives_the_likelihood_of_the_emulation(
    tmp_path: Path, recipe: str, layout: str
) -> None:
    source = tiny_gemma4_text(tmp_path / "source", max_position_embeddings=512)
    sharpen(source)
    source_model = load_emulation(source)
    ids = sample_ids(source_model, 500)
    if recipe == BY_LAYER:
        (tmp_path / "mine.yaml").write_text(BY_LAYER)
        recipe = str(tmp_path / "mine.yaml")
    checkpoint = run_convert(source, recipe, layout, tmp_path / "converted")
    with serve(checkpoint, tmp_path) as server:
        served = server.client.prompt_logprobs(ids)
    assert W4A4_KERNEL in {kernel.name for kernel in server.facts.kernels}
    emulated = token_logprobs(load_emulation(checkpoint), ids)
    # Right servers reach 0.86 to 0.87 here; a silent MLP gives 0.70, lost layer scalars 0.32, a wrong K or V 0.31.
    assert_close(served, emulated, least_correlation=0.8)
    # A right conversion is 0.47 nat above its source and has 0.69; the same faults give 0.54, 0.30 and 0.20.
    assert_close(served, token_logprobs(source_model, ids), nll=0.75, least_correlation=0.55)


@pytest.mark.parametrize(
    "recipe",
    [
        "nvfp4-full",
        "nvfp4-fp8",
        pytest.param("nvfp4", marks=pytest.mark.thorough),
        pytest.param("nvfp4-a16", marks=pytest.mark.thorough),
    ],
)
def test_transformers_reads_the_compressed_tensors_layout(
    converted_smollm2: Convert, prompt_ids: list[int], recipe: str
) -> None:
    pytest.importorskip("compressed_tensors", reason="transformers reads this layout with compressed-tensors")
    checkpoint = converted_smollm2(recipe, "compressed-tensors")
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto").eval()
    weight_only = recipe == "nvfp4-a16"
    assert_close(
        token_logprobs(model, prompt_ids),
        token_logprobs(load_emulation(checkpoint), prompt_ids),
        nll=0.02 if weight_only else 0.15,
        least_correlation=0.999 if weight_only else 0.9,
    )


def copy_without(checkpoint: Path, name: str, folder: Path) -> Path:
    """Copy a checkpoint but for one tensor, which neither its shard nor the index names any more."""
    shutil.copytree(checkpoint, folder)
    index_path = folder / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    shard = folder / index["weight_map"].pop(name)
    index_path.write_text(json.dumps(index))
    tensors = load_file(shard)
    del tensors[name]
    save_file(tensors, shard, metadata={"format": "pt"})
    return folder


@pytest.mark.usefixtures("vllm_environment")
def test_server_refuses_a_checkpoint_that_lacks_a_scale(converted_smollm2: Convert, tmp_path: Path) -> None:
    # Not a part of q, k, v or of gate, up: vLLM's check does not notice one that is missing from a fused layer.
    name = "model.layers.7.mlp.down_proj.weight_scale"
    broken = copy_without(converted_smollm2("nvfp4-a16", "compressed-tensors"), name, tmp_path / "broken")
    with pytest.raises(ServerDied, match=name), serve(broken, tmp_path):
        pass
