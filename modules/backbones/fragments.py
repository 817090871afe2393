"""A tokenizer for policies that are trained from nothing: whole fragments of text are single tokens."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from modules.environment import OF_ZOOM, REFUSALS
from modules.functional.grammar import format_number


@dataclass(frozen=True)
class FragmentVocabulary:
    """What the policy can say.

    Args:
        fragments: strings that are one token each; text is cut at the longest fragment that fits.
        coordinates: number of coordinate values, 0, step, 2 * step, …; 0 for none. A coordinate and
            the punctuation behind it are one token: ``"48, "`` inside a box, ``"48]}"`` at its end.
        step: distance of two coordinate values, in the units of the backbone's box space.
        zooms: factors by which a crop can be asked to be enlarged: ``"48], "`` and ``'"zoom": 2}'`` are tokens then.
    """

    fragments: list[str] = field(default_factory=list)
    coordinates: int = 0
    step: int = 1
    zooms: list[float] = field(default_factory=list)

    def coordinate_tokens(self) -> list[list[str]]:
        """The two families of coordinate tokens, three with `zooms`, each in the order of their values."""
        values = [str(k * self.step) for k in range(self.coordinates)]
        ends = [", ", "]}", "], "] if self.zooms else [", ", "]}"]
        return [[f"{v}{end}" for v in values] for end in ends] if values else []


def fragment_tokenizer(vocabulary: FragmentVocabulary) -> PreTrainedTokenizerFast:
    """A Hugging Face tokenizer over the fragments; ``decode(encode(text)) == text`` for text made of them.

    Raises:
        ValueError: if a fragment is empty or given twice.
    """
    words = [*vocabulary.fragments, *(t for family in vocabulary.coordinate_tokens() for t in family)]
    words += [f'"zoom": {format_number(zoom)}}}' for zoom in vocabulary.zooms]
    zooms = any('"zoom"' in word for word in words)
    said = [text for fault, text in REFUSALS.items() if zooms or fault not in OF_ZOOM]
    words += [text for text in dict.fromkeys(said) if text not in words]
    repeated = sorted({w for w in words if words.count(w) > 1} | ({""} & set(words)))
    if repeated:
        raise ValueError(f"Expected `fragments` to be distinct and not empty, but got {repeated}.")
    ids = {token: k for k, token in enumerate(["<pad>", "<unk>", "<eos>", "<image>", *words])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    longest_first = "|".join(re.escape(w) for w in sorted(words, key=len, reverse=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(longest_first), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<eos>",
        additional_special_tokens=["<image>"],
        clean_up_tokenization_spaces=False,
    )
