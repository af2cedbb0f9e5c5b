"""Weights of a model that a training starts from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from segfit.errors import StageError
from segfit.files import hash_file
from segfit.labels import LabelScheme
from segfit.networks.transfer import Transfer, transfer

__all__ = ["InitialWeights"]


@dataclass(frozen=True, slots=True, kw_only=True)
class InitialWeights:
    """Weights of another network.

    Parameters
    ----------
    identity : names their content
    path : a safetensors file, by the names of our networks
    checksum : SHA-256 of the file, if it is known
    labels : what their outputs are; None: not known, the same as those of the training
    heads : False: their outputs are no classes
    """

    identity: str
    path: Path
    labels: LabelScheme | None
    checksum: str = ""
    heads: bool = True

    def for_network(self, network: nn.Module, labels: LabelScheme) -> Transfer:
        """Return what a network for these labels takes over; `StageError` if the file is not what was written."""
        try:
            if self.checksum and hash_file(self.path) != self.checksum:
                raise StageError(f"{self.path} is damaged", "give the model again with --from")
            state = load_file(self.path)
        except (SafetensorError, OSError) as error:
            raise StageError(f"{self.path} cannot be read ({error})", "give the model again with --from") from None
        return transfer(state, network, labels, source=self.labels, heads=self.heads)
