"""What every reader of weights gives, whoever wrote them: our recipe and tensors under our names."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from d2v_ds.model.heads import HeadConfig
from d2v_ds.recipe import Recipe


@dataclass
class Stored:
    """A model as it lies on disk, read whole.

    What only pre-training needs may be absent from `tensors`, each part as a whole: decoders; in fine-tuned models
    the mask embedding too, and `norm.` of v1 images, whose head reads the last block's output.
    """

    recipe: Recipe
    tensors: dict[str, Tensor]
    """fp32, under our names: the student's plain, the teacher's under `teacher.`, a fine-tuned head's under `head.`."""
    origin: str
    """What was found, in words: 'fairseq data2vec_multi, fine-tuned (CTC)'."""
    files: Path | None = None
    """Folder with the tokenizer or preprocessor that belongs to it."""
    head: HeadConfig | None = None
    step: int | None = None
    """Updates the weights have seen, where the file says so."""
    weights: str = "student"
    """student, teacher (under the student's names) or both."""

    @property
    def source(self) -> str:
        """Where the weights came from first, whatever they were exported to since."""
        return re.sub(r"^(export of )+", "", self.origin)

    @property
    def is_own_run(self) -> bool:
        """Trained by d2v_ds, not read from a file of others."""
        return self.source.startswith("run")
