"""Compares the golden logits with those of transformers, which shares no code with reference.py.

    python3 tests/golden/validate.py [NAME...]       needs torch 2.15.0 and transformers 5.23.0 (CPU, float64)

Prints for each model the largest absolute difference of the logits from reference.py: "widened", with the
parts that transformers keeps in float32 (RMSNorm, router, softmax, cos and sin) read as float64, and "as
shipped". In both torch.topk, which leaves the order of ties open, is a stable sort. transformers drops MTP
layers; README.md says how they were checked.
"""
import json
import os
import sys
import tempfile

os.environ["CUDA_VISIBLE_DEVICES"] = ""
import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file

import reference as R
from make_golden import MODELS

HERE = os.path.dirname(os.path.abspath(__file__))
SINGLE, TO_SINGLE = torch.float32, torch.Tensor.float


def dequantised(tensors):
    """The tensors in float64; those in E4M3 times their block scales."""
    out = {}
    for k, v in tensors.items():
        if k.endswith("_scale_inv"):
            continue
        out[k] = v.double()
        if k + "_scale_inv" in tensors:
            s = tensors[k + "_scale_inv"].double().repeat_interleave(128, 0).repeat_interleave(128, 1)
            out[k] = out[k] * s[:v.shape[0], :v.shape[1]]
    return out


def load(name, folder):
    """The model in float64, through a copy of its files in `folder`."""
    source, tensors = os.path.join(HERE, "models", name), {}
    for f in os.listdir(source):
        if f.startswith("model") and f.endswith(".safetensors"):
            tensors |= load_file(os.path.join(source, f))
    with open(os.path.join(source, "config.json")) as f:
        config = json.load(f)
    config.pop("quantization_config", None)
    mtp = f"model.layers.{config['num_hidden_layers']}."
    tensors = {k: v for k, v in dequantised(tensors).items() if not k.startswith(mtp)}
    save_file(tensors, os.path.join(folder, "model.safetensors"), {"format": "pt"})
    with open(os.path.join(folder, "config.json"), "w") as f:
        json.dump(config | {"torch_dtype": "float64"}, f)
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager").eval()


def stable_topk(x, k, dim=-1, largest=True, sorted=True):
    values, indices = torch.sort(x, dim=dim, descending=largest, stable=True)
    return values.narrow(dim, 0, k), indices.narrow(dim, 0, k)


def widen(on):
    torch.float32 = torch.float = torch.float64 if on else SINGLE
    torch.Tensor.float = torch.Tensor.double if on else TO_SINGLE


def record(model):
    """Taps that modules of transformers take or give: name -> values, filled when the model runs."""
    seen = {}
    keep = lambda name, x: seen.update({name: x.reshape(-1, x.shape[-1]).numpy()})
    for name, module in model.named_modules():
        at = name.removeprefix("model.").split(".", 2)
        part, tap = at[-1], ".".join(at[:2])
        if part == "self_attn.o_proj":
            module.register_forward_pre_hook(lambda _, x, n=tap + ".o": keep(n, x[0]))
        if part in ("mlp.experts", "mlp.shared_experts"):
            kind = ".routed_out" if part == "mlp.experts" else ".shared_out"
            module.register_forward_hook(lambda _, x, y, n=tap + kind: keep(n, y))
    return seen


def difference(name, model, widened):
    """The largest of the logits, and of the taps that transformers has too."""
    seen = record(model)
    ids = R.read_safetensors(os.path.join(HERE, "models", name, "taps.safetensors"))["ids"].tolist()
    widen(widened)
    try:
        rotary = type(model.model.rotary_emb)
        model.model.rotary_emb = rotary(model.config)        # its frequencies once more, in the type of now
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0].numpy()
    finally:
        widen(False)
    assert logits.dtype == np.float64, logits.dtype
    ours = R.forward(os.path.join(HERE, "models", name), ids)
    assert len(seen) == len([k for k in ours if k.split(".")[-1] in ("o", "routed_out", "shared_out")])
    taps = max(np.abs(x - ours[k].reshape(x.shape)).max() for k, x in seen.items())
    return np.abs(logits - ours["logits"]).max(), taps


if __name__ == "__main__":
    torch.topk = stable_topk
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for name in sys.argv[1:] or MODELS:
        with tempfile.TemporaryDirectory() as folder:
            model = load(name, folder)
            found = *difference(name, model, True), *difference(name, model, False)
            print("{:12} widened {:.1e}, taps {:.1e}  as shipped {:.1e}, taps {:.1e}".format(name, *found),
                  flush=True)
