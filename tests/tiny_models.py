"""Tiny models with random weights and real tokenizers, so that no test downloads anything."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from embeddings.evidence import Evidence, EvidenceHead, GradeRegression
from embeddings.evidence_words import WORD_NUMBERS, WordNumbers

_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
_CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"


def tiny_bert_folder(
    path: Path, num_labels: int | None = None, *, width: int = 64, dropout: float = 0.1, seed: int = 0
) -> Path:
    """A BERT of two layers and two heads over a WordPiece vocabulary of letters and digits.

    With `num_labels` it is a sequence classifier, without it the bare encoder. Heads are half the width; 32 is the
    narrowest that inference engines take.
    """
    vocabulary = [*_SPECIAL, *_LETTERS, *(f"##{letter}" for letter in _LETTERS), ",", ".", ":", ">", "-"]
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=128,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        # wide enough that different texts get clearly different vectors
        initializer_range=0.3,
        **({} if num_labels is None else {"num_labels": num_labels}),
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = BertModel(config) if num_labels is None else BertForSequenceClassification(config)
    model.save_pretrained(path)
    _word_piece(vocabulary).save_pretrained(path)
    return path


def tiny_causal_lm_folder(path: Path, *, seed: int = 0) -> Path:
    """A Llama of two layers and width 64 over bytes: every digit is one token.

    Chat messages are joined by lines. Heads are 32 wide, the narrowest that inference engines take.
    """
    tokenizer = _byte_level()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def _word_piece(vocabulary: list[str]) -> PreTrainedTokenizerFast:
    ids = {token: index for index, token in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=128,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def _byte_level() -> PreTrainedTokenizerFast:
    special = ["<|begin|>", "<|end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate([*special, *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=special[0],
        eos_token=special[1],
        pad_token=special[1],
        chat_template=_CHAT_TEMPLATE,
        model_max_length=2048,
    )


def tiny_guideline_file(path: Path) -> Path:
    """A guideline short enough for a model that reads bytes."""
    path.write_text(
        """
version: tiny
title: Fit?
purpose: Judge the text.
grades:
  - {grade: 2, name: exact, definition: It is., tests: [All fits.]}
  - {grade: 1, name: partial, definition: Nearly., tests: [Some fits.]}
  - {grade: 0, name: irrelevant, definition: It is not., tests: [Nothing fits.]}
edge_cases:
  - {case: brand, rule: Another brand is partial., example: {query: a, product: b, grade: 1}}
template: |
  {title} {purpose} {grades} {edge_cases}
  <query>{query}</query>
  <product>{product}</product>
  Grade:
""",
        encoding="utf-8",
    )
    return path


def tiny_evidence_head(seen: int = 3) -> EvidenceHead:
    """A head that weighs words a little; `seen` of nine titles hold the word shoe."""
    words = len(WORD_NUMBERS)
    opinion = GradeRegression((0.0,) * words, (9.0,) * words, *[(0.05,) * (4 * words + 1)] * 2)
    weighing = GradeRegression((0.0,) * 4, (9.0,) * 4, *[(0.5,) * 17] * 2)
    return EvidenceHead(Evidence(WordNumbers(9, {"shoe": seen})), opinion, weighing)
