"""Tiny models of every family, with inputs and tokenizers, made in memory: two layers, width 16, random weights."""

from __future__ import annotations

import functools
import string
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

FAMILIES = ("bert", "roberta", "gpt2", "llama", "t5", "vit")  # what every contract test runs on

_SPECIAL = ["[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]"]  # as RoBERTa orders them: its positions count from the padding's id
_WORDS = (
    "the its an and or not is was it this that film movie book story actor plot scene good bad great poor fine dull bright "
    "very so too never always with of in on for from to by at as we you they he she loved hated saw read made"
).split()
VOCABULARY = (*_SPECIAL, *string.ascii_lowercase, *(f"##{c}" for c in string.ascii_lowercase), ".", ",", "!", "?", *_WORDS, "##ing", "##ed", "##ly")  # all different
SIZE = len(VOCABULARY)
CLS, PAD, SEP, UNK, MASK = range(5)

_WIDE: dict[str, Any] = {  # the names that most families share
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
}
_GROUPED = {**_WIDE, "num_key_value_heads": 2}
_T5 = {"d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": PAD}
_IMAGE = {**_WIDE, "image_size": 16, "patch_size": 4}
_DEBERTA = {
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_buckets": 8,
    "position_biased_input": False,
    "pooler_hidden_size": 16,
}
_BART = {"d_model": 16, "max_position_embeddings": 64, "decoder_start_token_id": SEP} | {
    f"{stack}_{name}": value for stack in ("encoder", "decoder") for name, value in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 32))
}
_CONFIGS: dict[str, dict[str, Any]] = {
    "bert": _WIDE,
    "roberta": _WIDE | {"max_position_embeddings": 66},
    "xlm-roberta": _WIDE | {"max_position_embeddings": 66},
    "camembert": _WIDE | {"max_position_embeddings": 66},
    "distilbert": {"dim": 16, "n_layers": 2, "n_heads": 4, "hidden_dim": 32, "max_position_embeddings": 64},
    "electra": _WIDE | {"embedding_size": 8},
    "albert": _WIDE | {"embedding_size": 8},
    "deberta-v2": _WIDE | _DEBERTA,
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_inner": 32, "n_positions": 64},
    "gpt_neox": _WIDE,
    "opt": {**_WIDE, "ffn_dim": 32, "word_embed_proj_dim": 16},
    "llama": _GROUPED,
    "mistral": _GROUPED | {"sliding_window": None},
    "qwen2": _GROUPED,
    "qwen3": _GROUPED | {"head_dim": 4},
    "gemma": _GROUPED | {"head_dim": 4},
    "gemma2": _GROUPED | {"head_dim": 4},
    "phi": _WIDE,
    "phi3": _GROUPED,
    "t5": _T5,
    "mt5": _T5 | {"feed_forward_proj": "gated-gelu"},
    "bart": _BART,
    "vit": _IMAGE,
    "deit": _IMAGE | {"architectures": ["DeiTForImageClassification"]},
    "audio-spectrogram-transformer": _WIDE | {"patch_size": 4, "num_mel_bins": 16, "max_length": 16, "frequency_stride": 4, "time_stride": 4},
}
ALL = tuple(_CONFIGS)
IMAGES = ("vit", "deit")
AUDIO = ("audio-spectrogram-transformer",)
SEQ2SEQ = ("t5", "mt5", "bart")
CAUSAL = ("gpt2", "gpt_neox", "opt", "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "phi", "phi3")
MASKED = ("bert", "roberta", "xlm-roberta", "camembert", "distilbert", "electra", "albert", "deberta-v2")

_AUTO = {
    "base": "AutoModel",
    "classification": "AutoModelForSequenceClassification",
    "tokens": "AutoModelForTokenClassification",
    "causal": "AutoModelForCausalLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "masked": "AutoModelForMaskedLM",
    "image": "AutoModelForImageClassification",
    "audio": "AutoModelForAudioClassification",
}


def model(family: str, task: str = "classification", *, labels: int = 3, seed: int = 0, config: dict[str, Any] | None = None) -> PreTrainedModel:
    """A tiny model in eval mode; `classification` of an image or audio family is what that means there.

    Args:
        family: one of `ALL`.
        task: base, classification, tokens, causal, seq2seq, masked, image or audio, as the family allows.
        config: further fields of the config, such as `{"vocab_size": 320}`.
    """
    if task == "classification":
        task = "image" if family in IMAGES else "audio" if family in AUDIO else task
    fields = {"vocab_size": SIZE, "pad_token_id": PAD, "bos_token_id": CLS, "eos_token_id": SEP, "num_labels": labels}
    settings = transformers.AutoConfig.for_model(family, **{**fields, **_CONFIGS[family], **(config or {})})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = getattr(transformers, _AUTO[task]).from_config(settings)
    return made.eval()


def inputs(family: str, *, batch: int = 3, length: int = 7, seed: int = 0) -> dict[str, torch.Tensor]:
    """A batch on which the family's classification and base models run; rows of text differ in length and are padded right."""
    random = torch.Generator().manual_seed(seed)
    if family in IMAGES:
        return {"pixel_values": torch.randn(batch, 3, 16, 16, generator=random)}
    if family in AUDIO:
        return {"input_values": torch.randn(batch, 16, 16, generator=random)}
    ids = torch.randint(len(_SPECIAL), SIZE, (batch, length), generator=random)
    lengths = [max(2, length - 2 * i % length) for i in range(batch)]
    mask = torch.tensor([[1] * n + [0] * (length - n) for n in lengths])
    ids[range(batch), [n - 1 for n in lengths]] = SEP  # T5 and BART classify at the end-of-text token
    ids = ids.masked_fill(mask == 0, PAD)
    return {"input_ids": ids, "attention_mask": mask}


@functools.cache
def _wordpiece() -> str:
    made = Tokenizer(models.WordPiece({w: i for i, w in enumerate(VOCABULARY)}, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)]
    )
    return made.to_str()


def tokenizer() -> PreTrainedTokenizerFast:
    """A WordPiece tokenizer whose ids the text models above understand; it spells any English word with its letters."""
    named = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(_wordpiece()), model_max_length=64, **named)


@functools.cache
def _byte_level() -> str:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=["<|endoftext|>"], initial_alphabet=sorted(alphabet), show_progress=False)
    made.train_from_iterator([" ".join(_WORDS), "the movie was good and the story was great", "a dull plot, a poor scene: not good!"] * 3, trainer)
    return made.to_str()


def bpe_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer as GPT-2 has it, with all 256 bytes; a model needs `vocab_size=len(tokenizer)` for it."""
    named = dict.fromkeys(("pad_token", "eos_token", "bos_token"), "<|endoftext|>")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(_byte_level()), model_max_length=64, **named)
