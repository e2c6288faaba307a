"""MODEL on the command line: what it may be, how it is loaded, and how inputs of T tokens are made for it.

    a folder with config.json    a Hugging Face model, built on the meta device from its config; no weights are read
    olmoe-1b-7b, deepseek-v3 ... a published model whose config ships with moepass (``PUBLISHED``)
    file.pt2                     a program saved by torch.export.save
    module:function, f.py:func   ``function()`` returns a module, or ``(module, example_args)``: this runs your code

Everything ends on the meta device, so a model of any size costs no memory and nothing is computed; with ``real`` (for
``--analyze``) the model keeps its weights where it has any, and its inputs are drawn at random (``explain.drawn``);
with ``drawn_weights`` (for ``moepass verify``) a config without weights gets random ones.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moepass import errors
from moepass.explain import drawn, inputs
from moepass.explain.drawn import Feed

#: Token counts that are priced when the user names none and the model takes any.
DEFAULT_TOKENS = (1, 512, 8192)
_CONFIGS = Path(__file__).with_name("configs")
#: Published models whose configs ship with moepass: sizes only, no weights.
PUBLISHED = tuple(sorted(path.parent.name for path in _CONFIGS.glob("*/config.json")))
#: Parameters that are drawn at random at most.
MAX_DRAWN = 500_000_000


@dataclass(frozen=True)
class Target:
    """A model (on the meta device unless ``source`` says otherwise) and a way to feed it.

    ``feed(T)``   (args, kwargs) with T tokens in total; ``feed(None)``: the example that came with the model
    ``tokens``    the counts to use where the user names none
    ``source``    of a model with weights: where they and its inputs come from, in words
    """

    name: str
    model: nn.Module
    feed: Feed
    tokens: tuple[int | None, ...]
    source: str | None = None


def load(
    name: str,
    *,
    dtype: torch.dtype | None = None,
    train: bool = False,
    real: bool = False,
    drawn_weights: bool = False,
) -> Target:
    """Load MODEL.  ``dtype`` overrides the model's own (not for .pt2, whose dtype is part of the program).

    ``real``: with its weights, where it has any; ``drawn_weights``: and with random ones where there is only a config.
    Raises `errors.BadTarget` or `errors.MissingPackage`.
    """
    path = Path(name)
    if path.suffix == ".pt2":
        return _from_export(name, path, dtype, train, real)
    if path.name == "config.json" or path.is_dir():
        folder = path.parent if path.name == "config.json" else path
        return _from_config(name, folder, dtype, train, real, drawn_weights)
    if name.lower() in PUBLISHED:
        return _from_config(name, _CONFIGS / name.lower(), dtype, train, real, drawn_weights)
    if ":" in name:
        return _from_function(name, dtype, train, real)
    raise errors.BadTarget(
        target=name,
        detail="neither a folder with config.json, nor a .pt2 file, nor module:function, nor a published model",
        remedy=f"give one of these; published models are {', '.join(PUBLISHED)}",
    )


def parse_dtype(text: str | None) -> torch.dtype | None:
    """``"bfloat16"`` -> ``torch.bfloat16``; raises `errors.BadOption` for anything that is not a float type."""
    if text is None:
        return None
    known = ("float32", "bfloat16", "float16", "float64")
    if text not in known:
        raise errors.BadOption(name="--dtype", value=text, detail=f"use one of {', '.join(known)}")
    dtype = getattr(torch, text)
    assert isinstance(dtype, torch.dtype)
    return dtype


def _from_config(
    name: str, folder: Path, dtype: torch.dtype | None, train: bool, real: bool, drawn_weights: bool
) -> Target:
    if not (folder / "config.json").is_file():
        raise errors.BadTarget(target=name, detail="there is no config.json in it", remedy="give a model folder")
    try:
        import transformers
    except ImportError:
        raise errors.MissingPackage(
            what="a Hugging Face config", package="transformers", install="moepass[transformers]"
        ) from None
    try:
        config = transformers.AutoConfig.from_pretrained(str(folder), local_files_only=True)
        weights = real and any(any(folder.glob(kind)) for kind in ("*.safetensors", "pytorch_model*.bin"))
        model = _read(transformers, config, folder, dtype) if weights else _build(transformers, config, dtype)
        if drawn_weights and not weights:
            model = _drawn(name, model, lambda: _build(transformers, config, dtype, "cpu"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise errors.BadTarget(
            target=name,
            detail=f"transformers cannot build it ({errors.first_line(error)})",
            remedy="check its config.json",
        ) from error
    target = _hf_target(name, model, train, weights or drawn_weights)
    return target if weights or not drawn_weights else replace(target, source=drawn.RANDOM)


def _drawn(name: str, planned: nn.Module, build: Callable[[], nn.Module]) -> nn.Module:
    """The model on the CPU as its own code initialises it, seed 0; ``planned`` is the same on the meta device."""
    count = sum(p.numel() for p in planned.parameters())
    if count > MAX_DRAWN:
        raise errors.BadTarget(
            target=name,
            detail=f"it has no weights here, and its {count / 1e9:.1f} G parameters are too many to draw",
            remedy=f"give a config of at most {MAX_DRAWN / 1e9:.1f} G, one with fewer layers for instance",
        )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build()


def _read(transformers: Any, config: Any, folder: Path, dtype: torch.dtype | None) -> nn.Module:
    """The model with its weights, as transformers loads it."""
    loader = _architecture(transformers, config) or transformers.AutoModelForCausalLM
    return _module(loader.from_pretrained(str(folder), local_files_only=True, dtype=dtype or config.dtype or "auto"))


def _build(transformers: Any, config: Any, dtype: torch.dtype | None, device: str = "meta") -> nn.Module:
    """The architecture that the config names; a causal LM, or the bare model, where it names none."""
    dtype = dtype or getattr(config, "dtype", None) or torch.float32
    cls = _architecture(transformers, config)
    with torch.device(device), _default_dtype(dtype):
        if cls is not None:
            return _module(cls(config))
        try:
            return _module(transformers.AutoModelForCausalLM.from_config(config))
        except ValueError:
            return _module(transformers.AutoModel.from_config(config))


def _architecture(transformers: Any, config: Any) -> Any:
    """The class that the config names, or None."""
    names = getattr(config, "architectures", None) or []
    return getattr(transformers, names[0], None) if names else None


def _hf_target(name: str, model: nn.Module, train: bool, real: bool = False) -> Target:
    config: Any = model.config
    for part in model.modules():  # T5's stacks have configs of their own
        own: Any = getattr(part, "config", None)
        if hasattr(own, "use_cache"):
            own.use_cache = False
    main = str(getattr(model, "main_input_name", "input_ids"))
    takes = set(inspect.signature(model.forward).parameters)

    def feed(tokens: int | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (), inputs.for_transformers(name, main, takes, config, inputs.dtype_of(model), tokens or 1)

    if not real:
        return Target(name, model.train(train), feed, DEFAULT_TOKENS)
    vocabulary = int(getattr(config.get_text_config(), "vocab_size", 1))
    source = f"its own weights; token ids drawn at random below {vocabulary}"
    return Target(name, model.train(train), drawn.feed(feed, model, vocabulary), DEFAULT_TOKENS, source)


def _from_export(name: str, path: Path, dtype: torch.dtype | None, train: bool, real: bool) -> Target:
    if dtype is not None:
        raise errors.BadTarget(
            target=name, detail="an exported program has its dtype built in", remedy="drop --dtype, or export it anew"
        )
    if train:
        raise errors.BadTarget(
            target=name, detail="an exported program has its mode built in", remedy="drop --train, or export it anew"
        )
    if not path.is_file():
        raise errors.BadTarget(target=name, detail="there is no such file", remedy="check the path")
    from torch.export.passes import move_to_device_pass

    try:
        program = torch.export.load(path)
    except Exception as error:  # whatever a damaged archive makes of the unpickler
        raise errors.BadTarget(
            target=name,
            detail=f"torch.export.load cannot read it ({errors.first_line(error)})",
            remedy="export it anew",
        ) from error
    if program.example_inputs is None:
        raise errors.BadTarget(target=name, detail="it holds no example inputs", remedy="export it anew")
    args, kwargs = inputs.to_meta(program.example_inputs)
    dims, example = inputs.exported_dims(program), program.example_inputs
    program = program if real else move_to_device_pass(program, "meta")
    module = _module(program.module())

    def feed(tokens: int | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (args, kwargs) if tokens is None else inputs.resize_exported(name, args, kwargs, dims, tokens)

    if not real:
        return Target(name, module, feed, (None,))
    return Target(name, module, drawn.feed(feed, module, 1, example), (None,), drawn.FROM_EXAMPLE)


def _from_function(name: str, dtype: torch.dtype | None, train: bool, real: bool) -> Target:
    made = _function(name)()
    parts = made if isinstance(made, tuple) else (made,)
    if not parts or not isinstance(parts[0], nn.Module) or len(parts) > 2:
        raise errors.BadTarget(
            target=name,
            detail=f"it returned {type(made).__name__}",
            remedy="return an nn.Module, or (module, example_args)",
        )
    real = real and not any(p.device.type == "meta" for p in parts[0].parameters())
    model = (parts[0] if real else inputs.module_to_meta(parts[0])).to(dtype=dtype)
    if len(parts) == 1 and hasattr(model, "config") and hasattr(model, "main_input_name"):
        return _hf_target(name, model, train, real)
    given = len(parts) == 2
    own = _as_args(parts[1]) if given else inputs.guess(name, model)
    example = inputs.to_meta(own, dtype)

    def feed(tokens: int | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (example, {}) if tokens is None else (inputs.resize(name, example, tokens), {})

    counts: tuple[int | None, ...] = (None,) if given else DEFAULT_TOKENS
    if not real:
        return Target(name, model.train(train), feed, counts)
    pool: Any = (inputs.in_dtype(own, dtype), {}) if given else None
    source = drawn.FROM_EXAMPLE if given else "its own weights; inputs drawn at random"
    return Target(name, model.train(train), drawn.feed(feed, model, inputs.vocabulary(model), pool), counts, source)


def _as_args(example: object) -> tuple[Any, ...]:
    if isinstance(example, (tuple, list)):
        return tuple(example)
    return (example,)


def _function(name: str) -> Callable[[], Any]:
    """The function of ``module:function`` or ``path/to/file.py:function``."""
    where, _, attribute = name.rpartition(":")
    try:
        module = _import_file(Path(where)) if where.endswith(".py") else _import_module(where)
    except (ModuleNotFoundError, FileNotFoundError) as error:
        raise errors.BadTarget(target=name, detail=str(error), remedy="check the name before the colon") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        raise errors.BadTarget(
            target=name, detail=f"{where} has no function {attribute!r}", remedy="check the name after the colon"
        )
    made: Callable[[], Any] = function
    return made


def _import_module(where: str) -> Any:
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    return importlib.import_module(where)


def _import_file(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _module(value: object) -> nn.Module:
    assert isinstance(value, nn.Module)
    return value
