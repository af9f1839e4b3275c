"""The head of a model, a part of its vocabulary at a time.

The model's own forward runs with its decoder replaced by the decoder's output and with a part of the head's rows. The
model then applies its own caps and factors to the logits. All of them work on each logit alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ...calibrate.model_names import tied_origin
from ...calibrate.skeleton import Skeleton, computing_on
from ...errors import InputError, NvquantError
from ...plan.heads import equal_tensors
from ...recipe.heads import stored_head

PART_BYTES = 64 << 20  # of the head's rows in float32


class Head:
    """The head of a skeleton's model.

    Raises:
        InputError: the model has no head that nvquant knows, or its weight is not stored.
    """

    def __init__(self, skeleton: Skeleton) -> None:
        self._skeleton = skeleton
        full: Any = skeleton.full
        head = full.get_output_embeddings()
        if not isinstance(head, nn.Linear):
            raise InputError(f"{type(full).__name__} has no head with logits", hint="its numbers cannot be measured")
        self._module = head
        self._owner, self._base = self._find_base(full)
        name = next(name for name, module in full.named_modules() if module is head)
        self._name = self._stored_name(name)
        self._bias = self._stored_bias(name) if head.bias is not None else None
        self._fill_beside(name)
        self.rows, self.cols = skeleton.source.infos()[self._name].shape

    def _find_base(self, owner: nn.Module) -> tuple[nn.Module, str]:
        """The owner of the base model, which contains the decoder but not the head, and its name there."""
        name, child = next(
            (name, child)
            for name, child in owner.named_children()
            if any(part is self._skeleton.decoder for part in child.modules())
        )
        return self._find_base(child) if any(part is self._module for part in child.modules()) else (owner, name)

    def _stored_name(self, head: str) -> str:
        """The tensor of the head's rows: under its own name, or the embedding that the model's class ties it to.

        Where both are stored and differ, transformers and vLLM read the head (see `plan.heads`).
        """
        skeleton = self._skeleton
        full: Any = skeleton.full
        stored = self._own_name(head)
        if f"{head}.weight" in full.all_tied_weights_keys:
            embedding = self._embedding()
            if stored is None or equal_tensors(skeleton.source, stored, embedding):
                return embedding
        if stored is None:
            raise InputError(
                f"{skeleton.source.where} stores no {head}.weight, and {type(full).__name__} does not tie it to "
                "the embedding",
                where=skeleton.source.where,
                hint="the checkpoint is incomplete",
            )
        return stored

    def _fill_beside(self, head: str) -> None:
        """Load the weights between the base model and the head, such as those of a transform of the hidden state. A
        model in its own right is no such part."""
        from accelerate.utils import set_module_tensor_to_device
        from transformers import PreTrainedModel

        skeleton = self._skeleton
        full: Any = skeleton.full
        paths = {id(module): name for name, module in full.named_modules()}
        others = {name for name, module in full.named_modules() if name and isinstance(module, PreTrainedModel)}
        skipped = (*others, paths[id(getattr(self._owner, self._base))], head)
        for name, value in full.state_dict().items():
            stored = None if any(name.startswith(f"{path}.") for path in skipped) else self._stored(name)
            if stored is not None and value.is_meta:
                read = skeleton.source.read(stored)
                set_module_tensor_to_device(full, name, skeleton.device, value=read, dtype=torch.float32)

    def _stored(self, parameter: str) -> str | None:
        """The name in the checkpoint of a parameter of the model that is stored unchanged, or None."""
        skeleton = self._skeleton
        infos = skeleton.source.infos()
        if parameter in infos:
            return parameter
        origin = skeleton.origins.get(parameter) or tied_origin(parameter, skeleton.full, skeleton.origins, infos)
        return None if origin is None or origin.converter is not None else origin.stored[0]

    def _own_name(self, head: str) -> str | None:
        """The stored weight of the head: of the model's own name, or else of the same shape under another."""
        source, origin = self._skeleton.source, self._skeleton.origins.get(f"{head}.weight")
        if f"{head}.weight" in source.infos():
            return f"{head}.weight"
        if origin is not None and origin.converter is None and origin.stored[0] in source.infos():
            return origin.stored[0]
        name = stored_head({name: info.shape for name, info in source.infos().items()})
        return name if name is not None and source.infos()[name].shape == self._module.weight.shape else None

    def _embedding(self) -> str:
        """The stored weight of the embedding.

        Raises:
            InputError: there is none.
        """
        skeleton = self._skeleton
        decoder: Any = skeleton.decoder
        embedding = decoder.get_input_embeddings()
        inside = next(inside for inside, module in skeleton.decoder.named_modules() if module is embedding)
        name = skeleton.stored_name(f"{skeleton.root}{inside}.weight")
        if name not in skeleton.source.infos():
            raise InputError(
                f"{skeleton.source.where} stores no {name}",
                where=skeleton.source.where,
                hint="the checkpoint is incomplete",
            )
        return name

    def _stored_bias(self, head: str) -> Tensor | None:
        source = self._skeleton.source
        names = (self._stored(f"{head}.bias"), f"{self._name.removesuffix('.weight')}.bias")
        return next((source.read(name).float() for name in names if name is not None and name in source.infos()), None)

    def ranges(self) -> Iterator[range]:
        """The numbers of the head's rows, a part at a time."""
        height = max(1, PART_BYTES // (4 * self.cols))
        for first in range(0, self.rows, height):
            yield range(first, min(self.rows, first + height))

    def read(self, rows: range) -> Tensor:
        """Some of the head's rows as stored, on the CPU. A quantized head is not read here."""
        return self._skeleton.source.read_rows(self._name, rows)

    def parts(self) -> Iterator[tuple[int, Tensor]]:
        """The head's rows in parts: number of the first row, and the rows as stored, on the CPU."""
        for rows in self.ranges():
            yield rows.start, self.read(rows)

    def logits(self, finished: Tensor, first: int, rows: Tensor) -> Tensor:
        """Compute the logits of a part of the vocabulary.

        Args:
            finished: float32 [tokens, hidden size], from `finish_batch`.
            first: number of the first row.
            rows: float32 [part, hidden size], on the device of `finished`.
        Returns:
            float32 [tokens, part], with the gradient of `finished`.
        """
        full: Any = self._skeleton.full
        base = getattr(self._owner, self._base)
        module = self._module
        weight, bias = module.weight, module.bias
        try:
            setattr(self._owner, self._base, _Gives(base, finished.unsqueeze(0)))
            module.weight = nn.Parameter(rows, requires_grad=False)
            if self._bias is not None:
                part = self._bias[first : first + len(rows)].to(rows.device)
                module.bias = nn.Parameter(part, requires_grad=False)
            first_id = next(iter(self._skeleton.loaded_ids), 0)  # some models embed them here too
            ids = torch.full((1, len(finished)), first_id, dtype=torch.int64, device=finished.device)
            logits = self._forward(ids)
        finally:
            setattr(self._owner, self._base, base)
            module.weight, module.bias = weight, bias
        if logits.shape != (len(finished), len(rows)):
            raise InputError(f"{type(full).__name__} computes logits in a way that nvquant does not support.")
        return logits.float()

    def _forward(self, ids: Tensor) -> Tensor:
        """The logits of the model's own forward, or where it requires an image too, of the text model in it.

        Raises:
            InputError: neither runs on token ids alone.
        """
        full: Any = self._skeleton.full
        refusals = []
        for model in dict.fromkeys([full, self._owner]):
            try:
                with computing_on(ids.device):
                    logits: Tensor = model(input_ids=ids).logits[0]
                return logits
            except (NvquantError, torch.OutOfMemoryError):
                raise
            except Exception as error:  # each model's code raises what it likes
                refusals.append(error)
        first = refusals[0]
        reason = (str(first).strip() or "no reason given").splitlines()[0].rstrip(" .:")
        raise InputError(
            f"{type(full).__name__} computes no logits of a text alone ({type(first).__name__}: {reason})",
            hint="its numbers cannot be measured",
        ) from first


class _Gives(nn.Module):
    """Stands in for the base model, or for the decoder in it, and gives its result."""

    def __init__(self, base: nn.Module, hidden: Tensor) -> None:
        super().__init__()
        self._real = [base]  # in a list, so that it is not registered as a child
        self._output = _Output(last_hidden_state=hidden)

    def forward(self, *_args: Any, **_kwargs: Any) -> Any:
        return self._output

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # Some heads' classes call a part of their base model (OPT), or ask it for what it knows.
            real = getattr(self._real[0], name)
            return self if callable(real) and isinstance(real, nn.Module) else real


class _Output(dict[str, Any]):
    """A base model's output, in which everything but the hidden state is None."""

    def __getattr__(self, name: str) -> Any:
        return self.get(name)

    def __getitem__(self, key: Any) -> Any:
        return self.get("last_hidden_state") if key == 0 else self.get(key)
