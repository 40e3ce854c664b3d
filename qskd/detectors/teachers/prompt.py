"""What an open-vocabulary detector is asked: the names of the classes, as texts of tokens, each as long as the detector reads."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer
from transformers.models.grounding_dino.modeling_grounding_dino import SPECIAL_TOKENS

from qskd.checkpoints.files import checkpoint_file
from qskd.checkpoints.json_files import read_json_file
from qskd.checkpoints.weights import reading
from qskd.datasets.classes import Explicit, listing
from qskd.errors import QskdError
from qskd.printable import one_line

TOKENIZER = "tokenizer.json"
_BEGIN, _END, _DOT, _ASKS = (
    SPECIAL_TOKENS  # transformers tells phrases apart by these numbers, of BERT's own vocabulary
)
_NAMED = {"[CLS]": _BEGIN, "[SEP]": _END, ".": _DOT, "?": _ASKS}
_SPACES = str.maketrans("_.?", "   ")  # a dot or a question mark ends a phrase
_REMEDY = "give other words for it: --set 'teacher.class_map={NAME: other words}'"


@dataclass(frozen=True)
class Chunk:
    """A text that is asked at once. first: the place of its first class among all. spans: of each class, its tokens' first place in
    `tokens` and the one after their last."""

    text: str
    first: int
    tokens: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Prompt:
    """labels: the classes, in order. chunks: asked one after another."""

    labels: tuple[str, ...]
    chunks: tuple[Chunk, ...]

    @property
    def texts(self) -> list[str]:
        return [chunk.text for chunk in self.chunks]


def words_for(labels: Sequence[str], class_map: Explicit | None = None) -> tuple[str, ...]:
    """What is asked for a dataset's classes: each one's name, or the words that the class map has for it; nothing for one that is
    left to nobody."""
    said = [(class_map or {}).get(label, label) for label in labels]
    return tuple(dict.fromkeys(word for word in said if word is not None))


def phrase_of(label: str) -> str:
    """As it is asked: small letters, spaces for underscores, and no dot or question mark, which would end it."""
    return " ".join(label.translate(_SPACES).lower().split())


def make_prompt(path: str, config: Any, words: Sequence[str]) -> Prompt:
    """The texts "a . b . c ." of all words, each as long as the detector reads. Reads the tokenizer, no weights. path: as
    `check_path` gives it. QskdError where a class can't be asked for."""
    if not words:
        raise QskdError(
            path,
            f"{config.model_type}, which finds what it is asked for, and it is asked for nothing",
            "the names of classes: a dataset's (--like SHARDS, a recipe's data), or --classes 'cat,dog'",
            "it can label, be cached, teach, be evaluated and predict; it can't be a student or exported: distil a student from it",
        )
    phrases = [phrase_of(word) for word in words]
    for number, phrase in enumerate(phrases):
        if (first := phrases.index(phrase)) != number:
            both = f"{one_line(words[first])} and {one_line(words[number])}, both asked as {phrase!r}"
            raise QskdError("teacher.class_map", both, "words that tell classes apart", _REMEDY)
    tokenizer = _tokenizer(path)
    tokens = [
        _tokens(tokenizer, word, phrase, config.text_config.vocab_size)
        for word, phrase in zip(words, phrases, strict=True)
    ]
    most, chunks, begin = config.max_text_len, list[Chunk](), 0
    while begin < len(words):
        end, length = begin, 2
        while end < len(words) and length + len(tokens[end]) + 1 <= most:
            length += len(tokens[end]) + 1
            end += 1
        if end == begin:
            found = f"{one_line(words[begin])}: {len(tokens[begin])} tokens"
            raise QskdError("teacher.class_map", found, f"at most {most - 3}, which the detector reads", _REMEDY)
        chunks.append(_chunk(phrases[begin:end], tokens[begin:end], begin))
        begin = end
    return Prompt(tuple(words), tuple(chunks))


def _chunk(phrases: Sequence[str], tokens: Sequence[Sequence[int]], first: int) -> Chunk:
    ids, spans = [_BEGIN], []
    for each in tokens:
        spans.append((len(ids), len(ids) + len(each)))
        ids += [*each, _DOT]
    return Chunk("".join(f"{phrase} . " for phrase in phrases).strip(), first, (*ids, _END), tuple(spans))


def _tokenizer(path: str) -> Any:
    with reading(path):
        file = checkpoint_file(path, TOKENIZER)
        if file is None:
            raise QskdError(
                path,
                f"no {TOKENIZER}, by which the names of classes become numbers",
                "the tokenizer that it was trained with",
                "save it again with its processor: AutoProcessor.from_pretrained(NAME).save_pretrained(FOLDER)",
            )
        tokenizer = Tokenizer.from_str(json.dumps(read_json_file(file)))
        tokenizer.no_truncation()
        tokenizer.no_padding()
    other = [name for name, number in _NAMED.items() if tokenizer.token_to_id(name) != number]
    if other:
        raise QskdError(
            str(file),
            f"{listing(other)}: other numbers than in BERT's vocabulary",
            f"{', '.join(f'{name} = {number}' for name, number in _NAMED.items())}, which transformers counts on",
            "give the checkpoint the tokenizer that it was trained with (bert-base-uncased's)",
        )
    return tokenizer


def _tokens(tokenizer: Any, word: str, phrase: str, known: int) -> tuple[int, ...]:
    encoded = tokenizer.encode(phrase, add_special_tokens=False)
    ids = tuple(encoded.ids)
    unknown = tokenizer.token_to_id("[UNK]")
    if not ids or all(one == unknown for one in ids) or set(ids) & set(SPECIAL_TOKENS) or max(ids) >= known:
        found = f"{one_line(word)}, which its text model can't read: {listing(encoded.tokens)}"
        raise QskdError("teacher.class_map", found, "words of the language that it was trained on", _REMEDY)
    return ids
