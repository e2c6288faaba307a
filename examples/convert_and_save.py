"""Convert a model in place, save its state as safetensors, load it into a fresh conversion, compare the logits.

``moepass.convert`` is deterministic from (seed, parameter name), so a second process that builds the same architecture
and calls convert with the same spec has the same parameter names and shapes; the file supplies the values.

    python examples/convert_and_save.py [--out FOLDER] [--experts 8] [--top-k 2]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

import moepass


def build_dense(seed: int) -> nn.Module:
    """A small float32 Llama."""
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_cache=False,
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def save(model: nn.Module, spec: moepass.MoESpec, folder: Path) -> None:
    """Write ``model.safetensors`` and ``spec.json``; each appears complete or not at all (rename)."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / "model.safetensors.tmp"
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, temporary)
    temporary.replace(folder / "model.safetensors")
    temporary = folder / "spec.json.tmp"
    temporary.write_text(spec.model_dump_json(indent=2))
    temporary.replace(folder / "spec.json")


def load(folder: Path) -> nn.Module:
    """Build the architecture, give it the saved spec's structure, fill in the saved values."""
    spec = moepass.MoESpec.model_validate(json.loads((folder / "spec.json").read_text()))
    model = build_dense(seed=123)  # other random weights: all values come from the file
    moepass.convert(model, spec)
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    return model


def main(argv: Sequence[str] | None = None) -> float:
    """Round trip; returns max |logit difference| between the saved and the loaded model (0.0 expected)."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder to write to; a temporary one by default")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--top-k", type=int, default=2)
    args = parser.parse_args(argv)

    spec = moepass.MoESpec(
        router=moepass.RouterSpec(top_k=args.top_k), experts=moepass.ExpertSpec(num_experts=args.experts)
    )
    model = build_dense(seed=0)
    ids = torch.arange(64)[None]
    with torch.no_grad():
        dense_logits = model(input_ids=ids).logits
        print(moepass.convert(model, spec))
        moe_logits = model(input_ids=ids).logits

    with tempfile.TemporaryDirectory() as scratch:
        folder = args.out or Path(scratch)
        save(model, spec, folder)
        loaded = load(folder)
        size = (folder / "model.safetensors").stat().st_size
    with torch.no_grad():
        round_trip = (loaded(input_ids=ids).logits - moe_logits).abs().max().item()

    drift = ((moe_logits - dense_logits).abs().max() / dense_logits.abs().max()).item()
    print(f"dense -> MoE:   max |logit difference| = {drift:.1e} x the logit scale")
    print(f"saved -> loaded: max |logit difference| = {round_trip:.1e}   ({size / 1e6:.1f} MB)")
    return round_trip


if __name__ == "__main__":
    main()
