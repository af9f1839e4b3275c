"""The head by parts of the vocabulary gives the model's own logits, and the walk's end its own final hidden state."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from nvquant.calibrate.record import finish_batch
from nvquant.calibrate.skeleton import Skeleton, load_outer
from nvquant.checkpoint.headers import Header
from nvquant.errors import InputError
from nvquant.stream.hidden import HiddenBudget
from nvquant.verify.numerics import head as heads
from nvquant.verify.numerics.head import Head
from safetensors.torch import load_file, save_file
from support.conversions import layer_weights, random_samples, skeleton_of
from support.tiny_models import WRITERS, perturb, tiny_gemma2, tiny_gemma4, tiny_gemma4_text, tiny_llama
from support.walking import OneLane
from torch import Tensor, nn
from verify.numerics.measuring import original

IN_MEMORY = HiddenBudget(0, 1 << 30, Path("no file is made"))
SMALL = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


def write(class_name: str, config: Any, folder: Path) -> Path:
    """A model of an architecture that the shared tiny models lack."""
    torch.manual_seed(0)
    model = getattr(transformers, class_name)._from_config(config, dtype=torch.bfloat16)
    perturb(model, 0)
    model.save_pretrained(folder)
    return folder


def phi(folder: Path) -> Path:
    """An untied head with a bias."""
    return write("PhiForCausalLM", transformers.PhiConfig(**SMALL, tie_word_embeddings=False), folder)


def cohere(folder: Path) -> Path:
    """A tied head whose logits are multiplied by a factor."""
    return write("CohereForCausalLM", transformers.CohereConfig(**SMALL, logit_scale=0.25), folder)


def granite(folder: Path) -> Path:
    """An untied head whose logits are divided."""
    config = transformers.GraniteConfig(**SMALL, logits_scaling=8.0, tie_word_embeddings=False)
    return write("GraniteForCausalLM", config, folder)


def gpt_neox(folder: Path) -> Path:
    """A head of another name, `embed_out`."""
    config = transformers.GPTNeoXConfig(**SMALL, tie_word_embeddings=False)
    return write("GPTNeoXForCausalLM", config, folder)


def untied_llama(folder: Path) -> Path:
    return tiny_llama(folder, tied=False)


def capped_gemma2(folder: Path) -> Path:
    return tiny_gemma2(folder, final_logit_softcapping=0.3)


def capped_gemma4(folder: Path) -> Path:
    """With a cap that its small logits feel."""
    return tiny_gemma4(folder, final_logit_softcapping=0.3)


OTHERS = (untied_llama, phi, cohere, granite, gpt_neox, capped_gemma2, capped_gemma4)
ALL = {**WRITERS, **{other.__name__: other for other in OTHERS}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    return ALL[request.param](tmp_path_factory.mktemp("model") / request.param)


@torch.no_grad()
def whole(folder: Path, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the last decoder layer gave, the final hidden state, and logits; all [tokens, ...]."""
    model = original(folder)
    last: list[Tensor] = []

    def keep(_module: nn.Module, _args: Any, output: Any) -> None:
        last.append(output[0] if isinstance(output, tuple) else output)

    model.get_decoder().layers[-1].register_forward_hook(keep)
    finished: list[Tensor] = []
    model.base_model.register_forward_hook(lambda _, __, output: finished.append(output.last_hidden_state))
    logits = model(input_ids=ids[None], use_cache=False).logits
    return last[0][0], finished[0][0], logits[0]


def by_parts(skeleton: Skeleton, finished: Tensor) -> Tensor:
    head = Head(skeleton)
    return torch.cat([head.logits(finished, first, rows.float()) for first, rows in head.parts()], dim=-1)


@pytest.mark.parametrize("folder", ALL, indirect=True)
def test_logits_by_parts_are_the_models_own(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (ids,) = random_samples((23,))
    _, finished, logits = whole(folder, ids)
    monkeypatch.setattr(heads, "PART_BYTES", 4 * finished.shape[1] * 100)  # parts of 100 rows, the last one smaller
    found = by_parts(skeleton_of(folder), finished)
    assert found.shape == logits.shape
    torch.testing.assert_close(found, logits, rtol=1e-5, atol=1e-5 * float(logits.abs().max()))


@pytest.mark.parametrize(
    "folder", [other.__name__ for other in OTHERS if other not in (untied_llama, gpt_neox)], indirect=True
)
def test_caps_factors_and_biases_of_these_models_show_in_their_logits(folder: Path) -> None:
    """Else the test above would pass without them."""
    (ids,) = random_samples((9,))
    _, finished, logits = whole(folder, ids)
    plain = finished @ original(folder).get_output_embeddings().weight.detach().T
    assert float((plain - logits).abs().max()) > 0.01 * float(logits.abs().max())


@pytest.mark.parametrize("folder", ALL, indirect=True)
def test_the_model_is_as_before_afterwards(folder: Path) -> None:
    skeleton = skeleton_of(folder)
    full: Any = skeleton.full
    before = dict(full.named_modules()), dict(full.named_parameters())
    by_parts(skeleton, torch.randn(3, Head(skeleton).cols))
    after = dict(full.named_modules()), dict(full.named_parameters())
    for old, new in zip(before, after, strict=True):
        assert list(old) == list(new) and all(old[name] is new[name] for name in old)


@pytest.mark.parametrize("folder", ALL, indirect=True)
def test_a_finished_batch_is_the_models_own_last_hidden_state(folder: Path) -> None:
    (ids,) = random_samples((23,))
    given, finished, _ = whole(folder, ids)
    skeleton = skeleton_of(folder)
    load_outer(skeleton, ids)
    found = finish_batch(skeleton, ids[None], given[None])[0]
    torch.testing.assert_close(found, finished, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("folder", ALL, indirect=True)
def test_a_walk_to_the_end_gives_the_models_own_last_hidden_state(folder: Path) -> None:
    samples = random_samples((23, 40))
    skeleton = skeleton_of(folder)
    walk = OneLane(skeleton, [ids[None] for ids in samples], IN_MEMORY, keeps_last=True)
    for layer in range(len(skeleton.layers)):
        walk.step(layer, layer_weights(skeleton, layer))
    for at, ids in enumerate(samples):
        found = finish_batch(skeleton, ids[None], walk.hidden.fetch(at))[0]
        torch.testing.assert_close(found, whole(folder, ids)[1], rtol=1e-5, atol=1e-5)


def test_layers_that_return_tuples_are_finished_too(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "llama")
    (ids,) = random_samples((12,))
    given, finished, _ = whole(folder, ids)
    skeleton = skeleton_of(folder)
    load_outer(skeleton, ids)
    decoder: Any = skeleton.decoder
    skeleton = replace(skeleton, model=TakesTuples(decoder))
    found = finish_batch(skeleton, ids[None], given[None])[0]
    torch.testing.assert_close(found, finished, rtol=1e-6, atol=1e-6)


class TakesTuples(nn.Module):
    """A Llama decoder with a loop of the old kind, whose layers return tuples."""

    def __init__(self, decoder: Any) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, input_ids: Tensor, **_: Any) -> Any:
        hidden = self.decoder.embed_tokens(input_ids)
        for layer in self.decoder.layers:
            hidden = layer(hidden)[0]
        return transformers.modeling_outputs.BaseModelOutputWithPast(last_hidden_state=self.decoder.norm(hidden))


def test_an_untied_head_that_is_missing_is_not_taken_from_the_embedding(tmp_path: Path) -> None:
    skeleton = skeleton_of(tiny_llama(tmp_path / "llama", tied=False))
    files = {name: file for name, file in skeleton.source.files.items() if name != "lm_head.weight"}
    source = replace(skeleton.source, files=files)
    source = replace(source, shards={file: drop(header, "lm_head.weight") for file, header in source.shards.items()})
    with pytest.raises(InputError, match=r"stores no lm_head\.weight, and LlamaForCausalLM does not tie it"):
        Head(replace(skeleton, source=source))


def drop(header: Header, name: str) -> Header:
    return replace(header, tensors={key: info for key, info in header.tensors.items() if key != name})


EMBEDDING = {"llama": "model.embed_tokens.weight", "gemma4": "model.language_model.embed_tokens.weight"}
EMBEDDING["gemma4 text"] = EMBEDDING["llama"]
WRITE = {"llama": tiny_llama, "gemma4": tiny_gemma4, "gemma4 text": tiny_gemma4_text}
Flag = bool | None
# (model, flag at the top, flag in text_config, factor between embedding and stored head; None stores no head)
TIES: list[tuple[str, Flag, Flag, float | None]] = [
    ("llama", True, None, None),
    ("llama", True, None, 1.0),
    ("llama", True, None, 1.5),  # the head is loaded, whatever the config says
    ("llama", None, None, 1.5),  # Llama's class is not tied where nothing is written
    ("llama", False, None, 1.0),
    ("gemma4 text", None, None, None),  # Gemma's is
    ("gemma4 text", False, None, 1.5),
    ("gemma4", True, None, None),
    ("gemma4", True, False, None),
    ("gemma4", None, True, None),
    ("gemma4", None, False, None),
    ("gemma4", None, None, None),
    ("gemma4", False, None, 1.5),  # the text config's class has a default of its own, which counts for nothing
    ("gemma4", False, True, 1.5),
    ("gemma4", True, True, 1.0),
    ("gemma4", True, True, 1.5),
]


@pytest.mark.parametrize(("name", "top", "text", "factor"), TIES)
def test_the_head_is_the_one_that_the_models_class_loads(
    name: str, top: Flag, text: Flag, factor: float | None, tmp_path: Path
) -> None:
    folder = WRITE[name](tmp_path / "model", shards=1)
    set_tie(folder, top, text)
    if factor is not None:
        tensors = load_file(folder / "model.safetensors")
        head = {"lm_head.weight": tensors[EMBEDDING[name]] * factor}
        save_file({**tensors, **head}, folder / "model.safetensors", {"format": "pt"})
    (ids,) = random_samples((12,))
    model_class = getattr(transformers, json.loads((folder / "config.json").read_text())["architectures"][0])
    model = model_class.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        finished = model.base_model(input_ids=ids[None], use_cache=False).last_hidden_state[0]
        logits = model(input_ids=ids[None], use_cache=False).logits[0]
    torch.testing.assert_close(by_parts(skeleton_of(folder), finished), logits, rtol=1e-5, atol=1e-5)


def set_tie(folder: Path, top: Flag, text: Flag) -> None:
    """Write the flags at both levels of config.json, or nothing where None."""
    config = json.loads((folder / "config.json").read_text())
    for part, flag in ((config, top), (config.get("text_config", {}), text)):
        part.pop("tie_word_embeddings", None)
        part.update({} if flag is None else {"tie_word_embeddings": flag})
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("name", ["lm_head.weight", "output.weight", "transformer.output_layer.weight"])
def test_a_head_under_another_name_is_found(name: str, tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "model", shards=1, tied=False)
    (ids,) = random_samples((12,))
    _, finished, logits = whole(folder, ids)
    tensors = load_file(folder / "model.safetensors")
    head = tensors.pop("lm_head.weight")
    save_file({**tensors, name: head}, folder / "model.safetensors", {"format": "pt"})
    torch.testing.assert_close(by_parts(skeleton_of(folder), finished), logits, rtol=1e-5, atol=1e-5)
