"""Small checkpoints of detectors that are asked in words: random weights, and BERT's way of reading, with a few words
and all letters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

KINDS = ("grounding-dino", "mm-grounding-dino")
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
WORDS = ("cat", "dog", "owl", "bird", "of", "prey", "light", *LETTERS, *(f"##{letter}" for letter in LETTERS))
_CLASSES = {"grounding-dino": "GroundingDino", "mm-grounding-dino": "MMGroundingDino"}


def tokenizer() -> Tokenizer:
    """BERT's own numbers for what transformers tells phrases apart by; WORDS from 1030 on."""
    vocabulary = {f"[unused{number}]": number for number in range(1030)}
    known = {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, "[MASK]": 103, ".": 1012, "?": 1029, ",": 1010}
    named = {number: name for name, number in known.items()}
    vocabulary = {named.get(number, name): number for name, number in vocabulary.items()}
    vocabulary |= {word: 1030 + number for number, word in enumerate(WORDS)}
    made = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 101), ("[SEP]", 102)]
    )
    made.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    return made


def make_asked(kind: str, folder: Path, side: int = 64, **changes: Any) -> Path:
    """A whole checkpoint as transformers saves it: model, tokenizer and image processor, of images of `side` pixels."""
    backbone = hf.SwinConfig(
        **{"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "window_size": 2, "image_size": side},
        out_indices=[2, 3, 4],
        drop_path_rate=0.0,
    )
    text = hf.BertConfig(
        **{"vocab_size": 1100, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
        **{"intermediate_size": 16, "max_position_embeddings": 64},
    )
    sizes: dict[str, Any] = {
        **{"d_model": 64, "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 4, "num_queries": 7},
        **{"decoder_attention_heads": 4, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_text_len": 32},
    }
    config = getattr(hf, f"{_CLASSES[kind]}Config")(backbone_config=backbone, text_config=text, **(sizes | changes))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(hf, f"{_CLASSES[kind]}ForObjectDetection")(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "backbone" not in name:
                    parameter.add_(torch.randn(parameter.shape), alpha=0.1)
    model.save_pretrained(folder)
    size = {"height": side, "width": side}
    images = hf.GroundingDinoImageProcessorPil(size=size, do_pad=False)
    own = {
        name: f"[{name[:-6].upper()}]" for name in ("unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
    }
    words = hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer(), **own)
    hf.GroundingDinoProcessor(images, words).save_pretrained(folder)
    return folder
