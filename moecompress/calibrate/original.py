"""The original model's activations beside those of a walk that compresses it, for the same tokens."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from moecompress.calibrate.capture import Enough, recording
from moecompress.calibrate.observe import Calibration, seam_on
from moecompress.model.memory import trim
from moecompress.model.walk import OpenModel, Walk


class Original:
    """A second walk, over a skeleton of its own, one layer ahead of the compressing one: `look`, compress, `keep`, and again.

    Costs the forward work of the original once more. In memory, beside the other walk: its hidden states [T, d] and what the
    experts of one layer are given, [T, d] again. Weights are of one layer, gone before the other walk's come.
    """

    def __init__(self, opened: OpenModel, calibration: Calibration, folder: Path):
        """``folder``: for resuming; it is made."""
        seam_on(opened)
        folder.mkdir(parents=True, exist_ok=True)
        self.opened, self.calibration, self.folder = opened, calibration, folder
        self.walk = Walk(opened, calibration.batches)
        self.hidden: torch.Tensor | None = None  # [T, d], what the experts of the layer looked at are given
        self._outputs: list[Any] = []

    def __enter__(self) -> Original:
        self.walk.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.walk.__exit__(kind, error, trace)

    def restore(self, layer: int) -> None:
        """Get in front of ``layer``. What is kept is as far as that, or a layer behind: `keep` comes after the other walk's."""
        for before in range(self.walk.restore(self.folder), layer):
            self.look(before)

    def look(self, layer: int) -> None:
        """Run a layer; afterwards ``hidden`` is what its experts are given, None where it has none."""
        self.hidden = None
        last = layer == len(self.opened.layers) - 1
        self.walk.layer = layer
        self.opened.load_layer(layer)
        if layer in self.opened.anatomy.moe:
            name = self.opened.anatomy.moe[layer].module
            experts = self.opened.model.get_submodule(name)
            with recording(self.opened.model.get_submodule(name.rpartition(".")[0]), experts, only=last) as recorder:
                outputs = [self._run(lane) for lane in range(len(self.calibration.batches))]
            self.hidden = torch.cat([hidden for hidden, _, _ in recorder.parts])
        elif not last:
            outputs = self.walk.run_all()
        self.opened.release_layer(layer)
        trim()
        if not last:
            self._outputs = outputs
            for lane, output in enumerate(outputs):
                self.walk.step(lane, output)

    def _run(self, lane: int) -> Any:
        try:
            return self.walk.run(lane)
        except Enough:
            return None

    def keep(self) -> None:
        """Save what `look` computed, so that a killed run can start behind it. The other walk must have saved its own."""
        if self.walk.resumable():
            self.walk.save(self.folder, self.walk.layer, self._outputs)
        self._outputs = []
