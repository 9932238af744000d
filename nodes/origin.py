"""Where a loaded model came from: what saving puts back, and what a file changed under a running model is told by."""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..quantizer.files.architecture import Architecture, canonical
from ..quantizer.files.container import DTYPES, TensorFile
from ..quantizer.files.identity import find_prefix
from ..quantizer.files.ternary import TernaryFile
from .files import stamp


@dataclass(frozen=True)
class Origin:
    """The file of a model, as it was when it was loaded.

    mapped  whether weights are still read from the file; then nothing may write into it
    """

    path: Path
    stamp: tuple[int, int, int]
    metadata: dict[str, str]
    dtypes: dict[str, torch.dtype] = field(repr=False)  # of the dense parameters, by BFL name
    mapped: bool
    architecture: Architecture

    @classmethod
    def of(cls, file: TernaryFile, mapped: bool) -> "Origin":
        dtypes = {name: DTYPES[file.file.entries[key].dtype] for name, key in file.dense.items()}
        return cls(file.path, stamp(file.path), dict(file.metadata), dtypes, mapped, file.architecture)

    def dtype(self, name: str) -> torch.dtype | None:
        """A dense parameter's dtype in the file, by the name it has in ComfyUI's model."""
        return self.dtypes.get(canonical(name))

    def scale(self, name: str) -> torch.Tensor | None:
        """A copy of a ternary Linear's scales as they are in the file; None where that is gone or another."""
        if self.replaced:
            return None
        try:
            file = TensorFile(self.path)
        except (OSError, ValueError):
            return None
        return file.tensor(f"{find_prefix(file.entries) or ''}{name}.weight_scale").clone()

    def check(self) -> None:
        """Raise RuntimeError where a file that is still read was written over.

        A new file in its place is no harm: the old one stays readable until it is closed.
        """
        if not self.mapped or not self.path.is_file():
            return
        now = stamp(self.path)
        if now != self.stamp and now[0] == self.stamp[0]:
            raise RuntimeError(
                f"{self.path.name} was written over while its model was in use. Run again to load the new file; "
                "to replace a file, write the new one under another name and rename it"
            )

    @property
    def replaced(self) -> bool:
        """Whether the file is gone, or another one."""
        try:
            return stamp(self.path) != self.stamp
        except OSError:
            return True
