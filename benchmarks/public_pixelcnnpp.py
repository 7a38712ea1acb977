"""pclucas14/pixel-cnn-pp, made to run on Python 3 and without a GPU, and its weights in condgen's network."""

from __future__ import annotations

import importlib.util
import re
import tempfile
from pathlib import Path
from typing import Any

from torch import Tensor

from condgen.nn.pixelcnnpp import PixelCnnPp


def load(folder: Path) -> Any:
    """utils, layers and model of a checkout as one module: `.cuda()` and one `print` are taken out, nothing else."""
    text = "\n".join((folder / f"{name}.py").read_text(encoding="utf-8") for name in ("utils", "layers", "model"))
    text = text.replace(".cuda()", "").replace("print e", "print(e)")
    text = re.sub(r"^from (utils|layers) import \*", "", text, flags=re.M)
    with tempfile.TemporaryDirectory() as made:
        file = Path(made) / "public_pixelcnnpp_joined.py"
        file.write_text(text, encoding="utf-8")
        spec = importlib.util.spec_from_file_location(file.stem, file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


def copy_weights(theirs: Any, ours: PixelCnnPp) -> None:
    """From their `PixelCNN` into a network of the same size: 3 scales, 3 colours."""
    state: dict[str, Tensor] = theirs.state_dict()

    def copy(module: Any, name: str, transposed: bool = False) -> None:
        weight = state[f"{name}.weight_v"]
        norm = weight.flatten(1).norm(dim=1).view(-1, *[1] * (weight.dim() - 1))
        weight = weight / norm * state[f"{name}.weight_g"]  # theirs norms a transposed weight by its inputs
        module.v.data = weight.view(module.v.shape)
        module.g.data = weight.transpose(0, 1).flatten(1).norm(dim=1) if transposed else weight.flatten(1).norm(dim=1)
        module.b.data = state[f"{name}.bias"]

    def block(module: Any, name: str) -> None:
        copy(module.conv_in, f"{name}.conv_input.conv")
        copy(module.conv_out, f"{name}.conv_out.conv")
        if module.skip is not None:
            copy(module.skip, f"{name}.nin_skip.lin_a")

    net: Any = ours
    copy(net.first_u, "u_init.conv")
    copy(net.first_above, "ul_init.0.conv")
    copy(net.first_left, "ul_init.1.conv")
    for scale in range(3):
        for stream, up, back in (("u", net.up_u, net.back_u), ("ul", net.up_ul, net.back_ul)):
            for i, module in enumerate(up[scale]):
                block(module, f"up_layers.{scale}.{stream}_stream.{i}")
            for i, module in enumerate(back[scale]):
                block(module, f"down_layers.{2 - scale}.{stream}_stream.{i}")
    for i in range(2):
        copy(net.halve_u[i], f"downsize_u_stream.{i}.conv")
        copy(net.halve_ul[i], f"downsize_ul_stream.{i}.conv")
        copy(net.double_u[i], f"upsize_u_stream.{1 - i}.deconv", transposed=True)
        copy(net.double_ul[i], f"upsize_ul_stream.{1 - i}.deconv", transposed=True)
    copy(net.head.out, "nin_out.lin_a")
