"""A GPU whose memory ends under a conversion: hidden states leave it, and a batch that no memory holds is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from nvquant.convert.options import ConvertOptions
from nvquant.convert.pipeline import convert
from nvquant.errors import InputError
from nvquant.stream.hidden import HiddenStates
from support.conversions import calibration_of, contents, planned, random_samples, write_ids
from support.tiny_models import tiny_llama

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


class Gpu:
    """Conversions of a model whose hidden states and whose layers each take hundreds of megabytes of a GPU."""

    TOKENS, SEQUENCES, HIDDEN = 4096, 96, 512

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        wide = {"hidden_size": self.HIDDEN, "intermediate_size": 16384, "head_dim": 128}
        self.source = tiny_llama(folder / "source", num_layers=2, max_position_embeddings=self.TOKENS, **wide)
        self.ids = write_ids(folder / "ids.jsonl", random_samples([self.TOKENS] * self.SEQUENCES))

    def convert(self, name: str, batch_size: int = 1) -> Path:
        """A run with the GPU; its peak of allocated memory is `torch.cuda.max_memory_allocated()` then."""
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        options = ConvertOptions(self.folder / name, "rtn", device="cuda", batch_size=batch_size)
        convert(planned(self.source), options, calibration_of(self.source, self.ids))
        return self.folder / name

    @property
    def hidden_bytes(self) -> int:
        """What all hidden states take in BF16."""
        return self.TOKENS * self.SEQUENCES * self.HIDDEN * 2


@pytest.fixture
def limited() -> Iterator[Callable[[int], None]]:
    """Gives torch's allocator so many bytes of the GPU, until the test ends."""

    def limit(size: int) -> None:
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(size / torch.cuda.get_device_properties(0).total_memory)

    yield limit
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


def test_hidden_states_leave_a_gpu_whose_memory_ends_and_no_byte_changes(
    tmp_path: Path, limited: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    conversions = Gpu(tmp_path)
    free = contents(conversions.convert("free"))
    peak = torch.cuda.max_memory_allocated()
    assert peak > conversions.hidden_bytes
    spilled: list[bool] = []
    spill = HiddenStates.spill

    def counted(self: HiddenStates) -> bool:
        spilled.append(spill(self))
        return spilled[-1]

    monkeypatch.setattr(HiddenStates, "spill", counted)  # the real one, and what it returned
    limited(peak - conversions.hidden_bytes // 4)
    assert contents(conversions.convert("limited")) == free
    assert spilled and spilled[0]


@pytest.mark.parametrize("share", [1, 8])  # of all hidden states; with one, not even they fit beside anything else
def test_a_batch_that_no_memory_holds_is_refused_with_its_option(
    tmp_path: Path, limited: Callable[[int], None], share: int
) -> None:
    conversions = Gpu(tmp_path)
    batch = conversions.SEQUENCES
    limited(share * conversions.hidden_bytes)
    with pytest.raises(InputError) as caught:
        conversions.convert("out", batch_size=batch)
    error = str(caught.value)
    assert error.startswith(f"--batch-size {batch}: the GPU's memory does not hold one decoder layer and a batch of")
    assert "use a smaller --batch-size" in error
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
