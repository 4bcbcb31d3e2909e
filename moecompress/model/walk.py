"""Walk a model layer by layer: the model's own forward, paused in front of every decoder layer.

Each micro-batch runs `model.forward` as a coroutine (a greenlet). Whenever it reaches a decoder layer it stops and waits.
The walk brings that layer's weights in, runs it for every waiting micro-batch as often as the caller wants, hands each one
its result, and takes the weights out again. So one layer's weights are in memory at a time, while masks, position
embeddings, hybrid layer types and everything between the layers stay the model's own business, for every family.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import nn
from transformers import PreTrainedModel

from moecompress.errors import UserError
from moecompress.model.anatomy import (
    EMBEDDING,
    HEAD,
    IGNORED,
    Anatomy,
    dissect,
    find_stacks,
    refuse_other_tasks,
    refuse_quantized,
)
from moecompress.model.checkpoint import Checkpoint, read_entry, read_header, write_shard, write_text
from moecompress.model.memory import arrange_heap, trim
from moecompress.model.skeleton import Loader, build_skeleton, load_config, release


class OpenModel:
    """A checkpoint, its weightless skeleton and its anatomy: what every stage starts from."""

    def __init__(self, folder: Path, dtype: torch.dtype | None = None, trust_remote_code: bool = False,
                 prepare: Callable[[PreTrainedModel], None] | None = None):  # fmt: skip
        """``dtype``: of the computation (None: as stored). ``prepare``: changes modules before weights are looked at."""
        self.checkpoint = Checkpoint(folder)
        config = load_config(folder, trust_remote_code)
        self.stored_dtype = stored_dtype(config)
        self.dtype = dtype or self.stored_dtype
        config.dtype = self.dtype
        config.get_text_config().dtype = self.dtype
        self.config = config
        self.model = build_skeleton(config, trust_remote_code)
        refuse_other_tasks(self.model)
        stacks, moe = find_stacks(self.model)
        if prepare is not None:
            prepare(self.model)
        else:
            refuse_quantized(self.checkpoint)
        self.loader = Loader(self.model)
        self.anatomy: Anatomy = dissect(self.checkpoint, self.model, self.loader, stacks, moe)

    @property
    def layers(self) -> Sequence[nn.Module]:
        """All layers in the order of the forward pass: those that the model has now, steps may have put others in."""
        return [self.model.get_submodule(name) for name in self.anatomy.layer_names]

    def load_layer(self, layer: int) -> None:
        """Bring the weights of one decoder layer in."""
        self._load(tensor.name for tensor in self.anatomy.of_layer(layer))

    def load_before(self) -> None:
        """Bring in what comes before the decoder layers: everything outside them except the head."""
        self._load(t.name for t in self.anatomy.of_layer(None) if t.role not in (IGNORED, HEAD))
        self.model.tie_weights()

    def load_after(self) -> None:
        """Bring in what comes behind the decoder layers: final norm and head; embeddings only if they are the head."""
        tied = bool(getattr(self.model, "all_tied_weights_keys", None))
        kept = (IGNORED,) if tied else (IGNORED, EMBEDDING)
        self._load(t.name for t in self.anatomy.of_layer(None) if t.role not in kept)
        self.model.tie_weights()

    def _load(self, names) -> None:
        self.loader.fill(names, self.checkpoint.read)

    def release_layer(self, layer: int) -> None:
        release(self.layers[layer])


def stored_dtype(config) -> torch.dtype:
    dtype = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


CHANGING = ""  # no child of a layer has this name


class Memory:
    """Outputs of the parts of a layer that a second run on the same inputs need not compute again.

    Parts are the layer's own children that own a matrix, such as attention. A second run of a micro-batch takes the output
    of each call from here, in the order of the first run, and computes what comes behind the last remembered call.
    What the ``changing`` module shall return in the second run can be given (`Walk.foretell`).
    """

    def __init__(self, layer: nn.Module, changing: nn.Module):
        """``changing``: the module (anywhere inside the layer) whose weights change between the runs."""
        self.parts: dict[str, nn.Module] = {CHANGING: changing} | {
            name: child for name, child in layer.named_children()
            if all(module is not changing for module in child.modules()) and any(w.ndim > 1 for w in child.state_dict().values())
        }  # fmt: skip
        self.lane = 0
        self.kept: dict[tuple[int, str], list[Any]] = {}
        self.ended: set[int] = set()  # micro-batches whose first run is over

    def __enter__(self) -> Memory:
        for name, child in self.parts.items():
            child.forward = self._remembering(name, child.forward)
        return self

    def __exit__(self, *_) -> None:
        for child in self.parts.values():
            del child.forward
        self.kept.clear()

    def _remembering(self, name: str, forward: Callable) -> Callable:
        def run(*args, **kwargs):
            kept = self.kept.setdefault((self.lane, name), [])
            if self.lane not in self.ended:
                output = forward(*args, **kwargs)
                if name != CHANGING:
                    kept.append(output)
                return output
            return kept.pop(0) if kept else forward(*args, **kwargs)

        return run


@dataclass
class _Waiting:
    """A micro-batch in front of a layer."""

    args: tuple
    kwargs: dict[str, Any]


class Walk:
    """``with Walk(opened, batches) as walk: for layer in walk.layers(): ...`` (see `run` and `step`).

    ``batches``: token ids, each [B, L], all sequences full (no padding), so no attention mask is needed.
    """

    def __init__(self, opened: OpenModel, batches: Sequence[torch.Tensor]):
        self.opened = opened
        self.model: PreTrainedModel = opened.model
        self.batches = batches
        largest, known = max(int(batch.max()) for batch in batches), self.model.get_input_embeddings().num_embeddings
        if largest >= known:
            raise UserError("The tokenizer does not belong to the model", expected=f"token numbers below {known}, the rows of the embedding",
                            got=largest, remedy="get tokenizer and weights from one source")  # fmt: skip
        self.waiting: list[_Waiting | None] = [None] * len(batches)
        self.outputs: list[Any] = [None] * len(batches)
        self.memory: Memory | None = None
        self._lanes: list[greenlet] = []
        self.layer = -1
        self._behind = False  # has a micro-batch passed the last layer?

    def __enter__(self) -> Walk:
        arrange_heap(self.opened.anatomy.largest_layer)
        self._hub = getcurrent()
        for index, layer in enumerate(self.opened.layers):
            layer.forward = self._pause(index)
        self.opened.load_before()
        try:
            with torch.no_grad():
                for lane in range(len(self.batches)):
                    self._lanes.append(greenlet(self._forward))
                    self._advance(lane, lane)
        except BaseException:
            self.__exit__()
            raise
        self._release_embeddings()
        return self

    def __exit__(self, *_) -> None:
        for lane in self._lanes:
            if not lane.dead:
                lane.throw(GreenletExit)
        for layer in self.opened.layers:
            layer.__dict__.pop("forward", None)
        release(self.model)
        trim()

    def layers(self, start: int = 0, ahead: Callable[[int], None] | None = None) -> Iterator[int]:
        """Load layer after layer; the caller must `step` every micro-batch before the next one.

        At the last layer, all `run`s must come before the first `step`, which trades the layer for the head.
        ``ahead``: called with a layer's number while no layer is loaded.
        """
        for layer in range(start, len(self.opened.layers)):
            if ahead is not None:
                ahead(layer)
            self.layer = layer
            self.opened.load_layer(layer)
            yield layer
            self.opened.release_layer(layer)
            trim()

    def run(self, lane: int) -> Any:
        """The current layer's output for one micro-batch, with whatever weights it has now. Changes nothing."""
        waiting = self.waiting[lane]
        assert waiting is not None, "this micro-batch has passed the last layer"
        layer, memory = self.opened.layers[self.layer], self.memory
        if memory is not None:
            memory.lane = lane
        if "kinds" in self.model.__dict__:  # runtime/kinds.py: the model itself was last called for another micro-batch
            self.model.__dict__["kinds"][0].ids = self.batches[lane]
        try:
            with torch.no_grad():
                return type(layer).forward(layer, *waiting.args, **waiting.kwargs)
        finally:
            if memory is not None:
                memory.ended.add(lane)

    @contextmanager
    def remembering(self, changing: nn.Module) -> Iterator[None]:
        """Inside, each micro-batch's second `run` does not compute again what does not depend on ``changing``."""
        with Memory(self.opened.layers[self.layer], changing) as self.memory:
            yield
        self.memory = None

    def foretell(self, outputs: Sequence[torch.Tensor]) -> None:
        """What the changing module will return to each micro-batch in its second `run`."""
        assert self.memory is not None
        for lane, output in enumerate(outputs):
            self.memory.kept[lane, CHANGING] = [output]

    def run_all(self) -> list[Any]:
        """`run` of every micro-batch."""
        return [self.run(lane) for lane in range(len(self.waiting))]

    def step(self, lane: int, output: Any) -> None:
        """Give a micro-batch its layer output and let the model carry it to the next layer (or to its end)."""
        for part in output if isinstance(output, tuple) else (output,):
            if isinstance(part, torch.Tensor) and part.is_floating_point() and not torch.isfinite(part).all():
                raise UserError(f"Decoder layer {self.layer} computes NaN or Inf in {str(part.dtype).removeprefix('torch.')}",
                                remedy="compute in another dtype (--set compute.dtype=float32), or repair the model")  # fmt: skip
        if self.layer == len(self.opened.layers) - 1 and not self._behind:
            self._behind = True
            self.opened.release_layer(self.layer)
            trim()
            self.opened.load_after()
        with torch.no_grad():
            self._advance(lane, output)

    def hand_on(self, outputs: list[Any], folder: Path | None = None) -> None:
        """`step` every micro-batch, forgetting each output; before that, `save` them in ``folder`` if there is one."""
        if folder is not None and self.resumable():
            self.save(folder, self.layer, outputs)
        for lane in range(len(outputs)):
            self.step(lane, outputs[lane])
            outputs[lane] = None

    def logits(self, lane: int, output: Any) -> torch.Tensor:
        """Like `step` after the last layer; returns the logits [B, L, V] and forgets them."""
        self.step(lane, output)
        logits, self.outputs[lane] = self.outputs[lane].logits, None
        return logits

    def _forward(self, lane: int) -> Any:
        ids = self.batches[lane]
        told = {"decoder_input_ids": ids} if self.model.config.is_encoder_decoder else {}  # the same text once more
        return self.model(input_ids=ids, use_cache=False, **told)

    def _pause(self, index: int) -> Callable:
        def forward(*args, **kwargs):
            return self._hub.switch(index, args, kwargs)

        return forward

    def _advance(self, lane: int, value: Any) -> None:
        self.waiting[lane] = None
        stop = self._lanes[lane].switch(value)
        if self._lanes[lane].dead:
            self.outputs[lane] = stop
            return
        index, args, kwargs = stop
        if index != self.layer + 1:
            raise UserError(f"{type(self.model).__name__} visits its layers out of order", expected=f"layer {self.layer + 1}",
                            got=f"layer {index}", remedy="this architecture is not supported yet")  # fmt: skip
        self.waiting[lane] = _Waiting(args, kwargs)

    def _release_embeddings(self) -> None:
        """The two big tables outside the layers are only needed at the ends of the walk."""
        for module in (self.model.get_input_embeddings(), self.model.get_output_embeddings()):
            if module is not None:
                release(module)

    # --- resuming -----------------------------------------------------------------------------------------------

    def resumable(self) -> bool:
        """False if layers share more than hidden states: a cache or a dict that they write to, or what an encoder said."""
        if self.model.config.is_encoder_decoder:
            return False
        plain = (torch.Tensor, bool, int, float, str, type(None), tuple)
        return all(
            isinstance(value, plain)
            for waiting in self.waiting
            if waiting is not None
            for value in (*waiting.args, *waiting.kwargs.values())
        )

    def save(self, folder: Path, layer: int, outputs: Sequence[Any]) -> None:
        """Keep the outputs of a finished layer, so that a killed run can start behind it."""
        tensors: dict[str, torch.Tensor] = {}
        stored: dict[int, str] = {}  # id of a tensor -> its name: lanes that share a tensor store it once
        shapes: list[tuple[bool, list[str | None]]] = []
        for lane, output in enumerate(outputs):
            parts = output if isinstance(output, tuple) else (output,)
            names: list[str | None] = []
            for index, part in enumerate(parts):
                if part is not None and id(part) not in stored:
                    stored[id(part)] = f"{lane}.{index}"
                    tensors[f"{lane}.{index}"] = part
                names.append(None if part is None else stored[id(part)])
            shapes.append((isinstance(output, tuple), names))
        write_shard(folder / f"hidden-{layer:04d}.safetensors", tensors, durable=False)
        write_text(folder / "walk.json", json.dumps({"layer": layer, "outputs": shapes}))
        (folder / f"hidden-{layer - 1:04d}.safetensors").unlink(missing_ok=True)

    def restore(self, folder: Path) -> int:
        """Fast-forward behind the last saved layer; returns the next layer to do (0 if nothing is saved)."""
        record = folder / "walk.json"
        if not record.exists():
            return 0
        state = json.loads(record.read_text())
        entries = read_header(folder / f"hidden-{state['layer']:04d}.safetensors")
        for self.layer in range(state["layer"] + 1):
            last = self.layer == state["layer"]
            read: dict[str, torch.Tensor] = {}
            for lane, (is_tuple, names) in enumerate(state["outputs"]):
                if last:
                    read.update({name: read_entry(entries[name]) for name in names if name and name not in read})
                    parts = [read[name] if name else None for name in names]
                else:  # any value will do: the saved output of the last finished layer replaces it
                    waiting = self.waiting[lane]
                    assert waiting is not None
                    hidden = waiting.args[0] if waiting.args else waiting.kwargs["hidden_states"]
                    parts = [hidden if name else None for name in names]
                self.step(lane, tuple(parts) if is_tuple else parts[0])
        return state["layer"] + 1
