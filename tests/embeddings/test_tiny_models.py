import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from tests.tiny_models import tiny_bert_folder, tiny_causal_lm_folder


def test_causal_lm_has_one_token_per_grade_and_answers(tmp_path):
    folder = tiny_causal_lm_folder(tmp_path / "lm")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    ids = [tokenizer(str(grade), add_special_tokens=False)["input_ids"] for grade in range(3)]
    assert [len(one) for one in ids] == [1, 1, 1]
    assert tokenizer.decode(tokenizer("Grade of é: 2")["input_ids"]) == "Grade of é: 2"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi\n"
    assert model(**tokenizer("lamp", return_tensors="pt")).logits.shape == (1, 4, len(tokenizer))


@pytest.mark.parametrize("num_labels", [3])
def test_classifier_reads_pairs_and_has_its_labels(tmp_path, num_labels):
    folder = tiny_bert_folder(tmp_path / "bert", num_labels)
    tokenizer, model = (
        AutoTokenizer.from_pretrained(folder),
        AutoModelForSequenceClassification.from_pretrained(folder),
    )
    features = tokenizer("red lamp", "lamp, red", return_tensors="pt")
    assert features["token_type_ids"].max() == 1
    assert tokenizer.unk_token_id not in features["input_ids"]
    with torch.no_grad():
        assert model(**features).logits.shape == (1, num_labels)
