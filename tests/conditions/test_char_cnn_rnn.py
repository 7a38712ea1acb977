"""The published char-CNN-RNN shapes: sizes, alphabet, recurrences."""

import pytest
import torch
from torch import nn

from condgen.errors import ConfigError, ShapeError
from condgen.nn.char_cnn_rnn import ALPHABET, CharCnnRnn, GatedRecurrence, ReluRecurrence, encode_characters


@pytest.mark.parametrize(
    ("shape", "steps", "width", "count"), [("cvpr", 8, 256, 1_814_144), ("icml", 18, 512, 4_045_184)]
)
def test_published_shapes(shape, steps, width, count):
    model = CharCnnRnn(shape)
    assert sum(p.numel() for p in model.parameters()) == count
    characters, _ = encode_characters(["a red bird"])
    assert model.hidden_states(characters).shape == (1, steps, width) and model.steps == steps
    assert model(characters).shape == (1, 1024)
    assert all(p.abs().max() <= 0.08 and p.abs().max() > 0.05 for p in model.parameters())


def test_lengths_between_layers():
    model = CharCnnRnn("icml", cnn_width=8)
    sizes = []
    for layer in (model.conv1, model.conv2, model.conv3):
        layer.register_forward_hook(lambda _, args, out: sizes.append((args[0].shape[-1], out.shape[-1])))
    model(encode_characters(["x"])[0])
    assert sizes == [(201, 198), (66, 63), (21, 18)]


def test_alphabet_and_its_duplicate():
    assert len(ALPHABET) == 70 and ALPHABET.index("-") == 36 and ALPHABET.rindex("-") == 59
    characters, mask = encode_characters(["a-Z é€ 0", ""])
    columns = [row.nonzero().flatten().tolist() for row in characters[0, :9]]
    assert columns == [[0], [59], [25], [69], [4], [], [69], [26], []]  # the euro sign keeps its place
    assert mask.sum(1).tolist() == [8, 0] and not characters[:, :, 36].any()
    assert characters.shape == (2, 201, 70) and encode_characters(["a" * 999])[1].all()


def test_activation_is_the_threshold_of_the_release():
    model = CharCnnRnn("cvpr", cnn_width=4, embed_width=4)
    seen = []
    model.recurrence.register_forward_hook(lambda _, args, out: seen.append(args[0]))
    for conv in (model.conv1, model.conv2, model.conv3):
        nn.init.zeros_(conv.weight)
        nn.init.constant_(conv.bias, 5e-7)
    model(torch.zeros(1, 201, 70))
    assert not seen[0].any()
    nn.init.constant_(model.conv3.bias, 2e-6)
    model(torch.zeros(1, 201, 70))
    assert torch.allclose(seen[1], torch.tensor(2e-6), atol=0)


def test_relu_recurrence_by_hand():
    torch.manual_seed(0)
    cell, x = ReluRecurrence(3), torch.randn(2, 4, 3)
    W, b, U, c = cell.input.weight, cell.input.bias, cell.hidden.weight, cell.hidden.bias
    h = torch.relu(x[:, 0] @ W.T + b)  # no hidden bias in the first step
    expected = [h]
    for t in range(1, 4):
        h = torch.relu(x[:, t] @ W.T + b + h @ U.T + c)
        expected.append(h)
    torch.testing.assert_close(cell(x), torch.stack(expected, 1))


def test_gated_recurrence_by_hand_and_not_as_torch():
    torch.manual_seed(0)
    cell, x = GatedRecurrence(3), torch.randn(2, 4, 3)
    h = torch.tanh(cell.input(x[:, 0]))
    expected = [h]
    for t in range(1, 4):
        u = torch.sigmoid(cell.input_update(x[:, t]) + cell.hidden_update(h))
        r = torch.sigmoid(cell.input_reset(x[:, t]) + cell.hidden_reset(h))
        cand = torch.tanh(cell.input(x[:, t]) + cell.hidden(r * h))
        h = u * cand + (1 - u) * h
        expected.append(h)
    torch.testing.assert_close(cell(x), torch.stack(expected, 1))
    gru = nn.GRU(3, 3, batch_first=True)
    with torch.no_grad():  # the same weights in torch's order: reset, update, new
        gru.weight_ih_l0.copy_(torch.cat([cell.input_reset.weight, cell.input_update.weight, cell.input.weight]))
        gru.weight_hh_l0.copy_(torch.cat([cell.hidden_reset.weight, cell.hidden_update.weight, cell.hidden.weight]))
        gru.bias_ih_l0.copy_(torch.cat([cell.input_reset.bias, cell.input_update.bias, cell.input.bias]))
        gru.bias_hh_l0.copy_(torch.cat([cell.hidden_reset.bias, cell.hidden_update.bias, cell.hidden.bias]))
    assert not torch.allclose(gru(x)[0], cell(x), atol=1e-2)


def test_output_reads_the_mean_of_the_states():
    torch.manual_seed(0)
    characters, _ = encode_characters(["a small bird"])
    model = CharCnnRnn("icml", cnn_width=8, embed_width=4).eval()
    states = model.hidden_states(characters)
    torch.testing.assert_close(model(characters), model.output(states.mean(1)))
    model.average = False
    torch.testing.assert_close(model(characters), model.output(states[:, -1]))


@pytest.mark.parametrize("shape", ["cvpr", "icml"])
def test_from_tensors_under_a_prefix(shape):
    torch.manual_seed(0)
    model = CharCnnRnn(shape, cnn_width=8, embed_width=6).eval()
    tensors = {f"encoder.text.{k}": v for k, v in model.state_dict().items()} | {"image.weight": torch.zeros(3)}
    characters, _ = encode_characters(["a bird", "a plane"])
    again = CharCnnRnn.from_tensors(tensors).eval()
    assert again.shape == shape and torch.equal(again(characters), model(characters))
    with pytest.raises(ConfigError, match="found 0"):
        CharCnnRnn.from_tensors({"w": torch.zeros(1)})
    tensors.pop("encoder.text.output.bias")
    with pytest.raises(ConfigError, match=r"output\.bias"):
        CharCnnRnn.from_tensors(tensors)


def test_wrong_input_is_named():
    model = CharCnnRnn("cvpr", cnn_width=4, embed_width=4)
    with pytest.raises(ShapeError, match="70"):
        model(torch.zeros(1, 201, 71))
    with pytest.raises(ShapeError, match="too few"):
        model(torch.zeros(1, 20, 70))
    with pytest.raises(ConfigError, match="cvpr, icml"):
        CharCnnRnn("nips")


def test_gradient_reaches_every_parameter():
    torch.manual_seed(0)
    model = CharCnnRnn("icml", cnn_width=8, embed_width=4)
    model(encode_characters(["a small bird with a red head and long wings " * 4])[0]).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
