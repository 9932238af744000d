"""The miniature's text encoder: three tables of embeddings, trained together with the transformer.

A token's context vector is the sum of its word's, the previous word's and its position's embedding: FLUX.1 gives text
tokens no positions of its own, and the previous word ties a colour to its shape.
"""

import re
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from .scenes import COLOURS, COUNTS, PLURALS, SHAPES

LENGTH = 8
CHANNELS = 128
PADDING = "<pad>"
WORDS = (PADDING, "a", "and", *COUNTS, "left", "right", "of", "above", "below", *COLOURS, *SHAPES, *PLURALS.values())
_INDEX = {word: index for index, word in enumerate(WORDS)}
_ALIASES = {"an": "a", "one": "a", "2": "two", "3": "three", "4": "four"}
_ALIASES |= {"under": "below", "over": "above", "plus": "cross", "disc": "circle"}
_SILENT = {"to", "the", "is", "with", "on"}
_OPENING = re.compile(r"^\s*(an? )?(photo|picture|image|drawing) of ")


def tokenize(prompt: str) -> tuple[list[int], list[str]]:
    """Word numbers of a prompt, and its words outside the vocabulary."""
    words = [_ALIASES.get(word, word) for word in re.findall(r"[a-z]+|\d+", _OPENING.sub("", prompt.lower()))]
    words = [word for word in words if word not in _SILENT]
    known = [_INDEX[word] for word in words if word in _INDEX and word != PADDING]
    return known, [word for word in words if word not in _INDEX]


def tokens(prompts: list[str]) -> Tensor:
    """Word numbers int64 [P, 8], padded or cut; unknown words are left out."""
    known = [tokenize(prompt)[0][:LENGTH] for prompt in prompts]
    return torch.tensor([numbers + [0] * (LENGTH - len(numbers)) for numbers in known])


class TextEncoder(nn.Module):
    def __init__(self, channels: int = CHANNELS):
        super().__init__()
        self.word = nn.Embedding(len(WORDS), channels)
        self.previous = nn.Embedding(len(WORDS), channels)
        self.position = nn.Embedding(LENGTH, channels)
        self.summary = nn.Embedding(len(WORDS), channels)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Word numbers [P, 8] to context [P, 8, C] and pooled [P, C]."""
        before = nn.functional.pad(tokens[:, :-1], (1, 0))
        context = self.word(tokens) + self.previous(before) + self.position.weight
        # A bag of words, without padding, of about unit variance.
        pooled = (self.summary(tokens) * (tokens > 0)[..., None]).sum(1) / LENGTH**0.5
        return context, pooled

    def encode(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Prompts to context [P, 8, C] and pooled [P, C]."""
        return self(tokens(prompts).to(self.word.weight.device))


def load(path: Path) -> TextEncoder:
    """The text encoder, fp32, of a safetensors file."""
    state = load_file(path)
    encoder = TextEncoder(state["word.weight"].shape[1])
    encoder.load_state_dict({name: value.float() for name, value in state.items()})
    return encoder.eval().requires_grad_(False)
