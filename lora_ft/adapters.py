"""Choose the layers, put LoRA in through PEFT, save and load an adapter folder."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import peft
import safetensors
import torch
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, set_seed

from lora_ft import base as bases
from lora_ft import environment, sources, tasks
from lora_ft.base import Base
from lora_ft.config import LoraConfig, Quant, RunConfig, from_yaml
from lora_ft.errors import AdapterError
from lora_ft.weights import Weights, require

log = logging.getLogger(__name__)

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"

# What `load` and `merge` read of the two files, and of which type each must be.
RECORD: dict[str, Any] = {"base": dict, "dtype": str, "quant": str, "left_whole": list}
BASE_RECORD: dict[str, Any] = {
    "name": str, "source": str, "repo": str | None, "revision": str | None, "origin": str, "weights_sha256": str
}  # fmt: skip
SETTINGS: dict[str, Any] = {
    "peft_type": str,
    "task_type": str,
    "base_model_name_or_path": str,
    "r": int,
    "lora_alpha": int | float,
    "lora_dropout": int | float,
    "target_modules": str | list,
    "modules_to_save": list | None,
    "trainable_token_indices": list | dict | None,
    "rank_pattern": dict,
    "alpha_pattern": dict,
    "use_rslora": bool,
    "use_dora": bool,
}
DTYPES = ("float32", "bfloat16", "float16")


def attach(
    base: Base,
    config: LoraConfig,
    *,
    peft_task: str,
    seed: int = 42,
    special_tokens: tuple[str, ...] = (),
    batches: Iterable[dict[str, torch.Tensor]] = (),
) -> peft.PeftModel:
    """Returns the base with a fresh adapter in it; only the adapter requires a gradient.

    The seed is set before A is drawn, so that the same seed gives the same run.

    Args:
        peft_task: PEFT's task type, such as `CAUSAL_LM`.
        special_tokens: tokens to add to the vocabulary; their embedding rows alone are trained.
        batches: model inputs for `--lora.init eva`, which starts A from their activations.

    Raises:
        AdapterError: a target matches no module, a token is not in the vocabulary, or the start cannot be made.
    """
    if config.dora and base.quant == "int8" and base.device.type == "cpu":
        # PEFT 0.21 moves the weight to read it, upon which bitsandbytes 0.50 loses its scales.
        raise AdapterError("lora.dora does not work on an int8 base on a CPU: use --quant nf4 or --quant none.")
    token_rows = _token_rows(base, special_tokens, config.train_tokens)
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=_targets(base, config.targets),
        use_rslora=config.uses_rslora,
        use_dora=config.dora,
        init_lora_weights=True if config.init in ("default", "loftq") else config.init,
        eva_config=peft.EvaConfig() if config.init == "eva" else None,
        modules_to_save=[*base.task_heads, *config.save_modules] or None,
        rank_pattern=dict(config.rank_pattern),
        alpha_pattern=dict(config.alpha_pattern),
        trainable_token_indices=token_rows,
        task_type=peft_task,
        base_model_name_or_path=base.source.repo or base.source.name,
        revision=base.source.revision,
    )
    # PEFT would write the folder that the weights were read from.
    base.model.name_or_path = settings.base_model_name_or_path
    set_seed(seed)
    try:
        model = peft.get_peft_model(base.model, settings)
    except ValueError as error:
        raise AdapterError(f"{base.source.name}: PEFT cannot adapt this model: {error}") from None
    if config.init == "eva":
        try:
            peft.initialize_lora_eva_weights(model, list(batches))
        except ValueError as error:
            raise AdapterError(f"lora.init=eva: PEFT cannot start this adapter from activations: {error}") from None
    _in_float32(model)
    if config.init == "loftq":
        _correct_quantization_error(model, base)
    elif config.init in ("pissa", "olora"):
        # These moved the base by -s B A, so what is saved must say how far the adapter came from there.
        model.start = {k: t.clone() for k, t in peft.get_peft_model_state_dict(model).items() if ".lora_" in k}
    return model


def trained(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Returns the parameters that training changes, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _in_float32(model: torch.nn.Module) -> None:
    """Casts what is trained to float32: 16-bit steps round away, and the gradient scaler of float16 refuses them.

    PEFT casts A, B and rows of tokens, but neither modules trained whole nor an A that came from EVA.
    """
    for parameter in trained(model).values():
        # In place, so that parameters that are tied stay so.
        parameter.data = parameter.data.float()


def frozen_digest(model: torch.nn.Module) -> str:
    """Returns a sha256 over every parameter and buffer that training must not change."""
    digest = hashlib.sha256()
    # By identity: a trained tensor can stand under a second name where embeddings are tied.
    learned = {id(p) for p in trained(model).values()}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in learned and isinstance(tensor, torch.Tensor):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


@contextmanager
def without(model: peft.PeftModel) -> Iterator[None]:
    """Runs the block with the base as it was before the adapter, even where the adapter's start moved its weights."""
    start = getattr(model, "start", None)
    if start is None:
        with model.disable_adapter():
            yield
        return
    # W - s B0 A0 is what the base holds, so B0 and A0 give W back.
    now = {k: t.clone() for k, t in peft.get_peft_model_state_dict(model).items() if k in start}
    whole = [module for module in model.modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    try:
        peft.set_peft_model_state_dict(model, start)
        for module in whole:
            module.enable_adapters(False)
        yield
    finally:
        peft.set_peft_model_state_dict(model, now)
        for module in whole:
            module.enable_adapters(True)


def save(model: peft.PeftModel, folder: Path) -> None:
    """Writes `adapter_model.safetensors` and `adapter_config.json`, plain PEFT with the same bytes every time.

    Raises:
        AdapterError: a tensor of the adapter is not finite; such an adapter is never saved.
    """
    broken = [name for name, p in trained(model).items() if not torch.isfinite(p).all()]
    if broken:
        raise AdapterError(f"{broken[0]} and {len(broken) - 1} more adapter tensors are not finite; nothing was saved.")
    # Added tokens are saved as rows, so the whole embedding matrix need not be.
    model.save_pretrained(folder, safe_serialization=True, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's card, full of placeholders; ours comes with the report
    path = folder / CONFIG
    settings = json.loads(path.read_text(encoding="utf-8"))
    # A and B are in the file, so whoever loads it must not start them anew.
    settings.update(init_lora_weights=True, eva_config=None)
    if hasattr(model, "start"):
        _save_difference(model.start, folder, settings)
    # PEFT turns sets into lists in hash order.
    for key, value in settings.items():
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            settings[key] = sorted(value)
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@dataclass
class Loaded:
    """An adapter on its base, ready to use, and the record of the run that made it."""

    folder: Path
    base: Base
    model: peft.PeftModel
    task: tasks.Task
    config: RunConfig
    record: dict[str, Any]


def load(folder: Path, base_name: str | None = None, device: str | None = None) -> Loaded:
    """Returns the adapter in `folder` on the base that it was made on, in evaluation mode.

    Args:
        base_name: where to find the base, when it has moved; its weights must be the recorded ones.

    Raises:
        AdapterError: the folder is incomplete, the base's weights are others, or tensors do not fit.
        SourceError: the base cannot be found.
    """
    record = read_record(folder)
    settings = lora_settings(folder)
    config, task = read_task(folder, record)
    source = find_base(record["base"], base_name)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    base = bases.load(
        source,
        quant=record["quant"],
        model_class=task.model_class,
        dtype=_dtype(record["dtype"], device),
        device=device,
        seed=config.train.seed,
        config_changes=task.config_changes(),
    )
    base.tokenizer = bases.load_tokenizer(folder)
    enlarge(base.model, len(base.tokenizer))
    base.model.name_or_path = settings.base_model_name_or_path
    with _named(folder / CONFIG):
        model = peft.get_peft_model(base.model, settings)
    _in_float32(model)
    _fill(model, folder)
    model.eval()
    bases.keep_weights_in_place(model)
    return Loaded(folder, base, model, task, config, record)


def _dtype(recorded: str, device: str) -> str:
    """Returns the dtype that the run computed in, or where the GPU lacks bfloat16 the one that replaces it."""
    if recorded != "bfloat16" or not device.startswith("cuda"):
        return recorded
    possible, why = bases.choose_dtype("auto", device)
    name = str(possible).removeprefix("torch.")
    if name != recorded:
        log.info("the adapter was trained in %s, but is used in %s: %s", recorded, name, why)
    return name


def read_record(folder: Path) -> dict[str, Any]:
    """Returns the contents of `environment.json`. Raises AdapterError naming all that is missing or not as it was."""
    record = environment.read(folder)
    if not isinstance(record, dict):
        raise AdapterError(f"{folder / environment.FILE}: it holds a {type(record).__name__}, not an object.")
    problems = unlike(record, RECORD)
    if isinstance(record.get("base"), dict):
        problems += unlike(record["base"], BASE_RECORD, "base.")
    problems += [
        f"{key} is {record[key]!r}, not one of {', '.join(allowed)}"
        for key, allowed in (("dtype", DTYPES), ("quant", get_args(Quant)))
        if isinstance(record.get(key), str) and record[key] not in allowed
    ]
    if problems:
        raise AdapterError(f"{folder / environment.FILE}: {'; '.join(problems)}: the file was damaged.")
    return record


def read_task(folder: Path, record: dict[str, Any]) -> tuple[RunConfig, tasks.Task]:
    """Returns the configuration of the run that made the adapter in `folder`, and its task.

    Args:
        record: of `read_record`; it holds what the task learned of the rows.

    Raises:
        AdapterError: what the record says of the task does not fit it.
        ConfigError: `config.yaml` is missing or wrong.
    """
    config = from_yaml(RunConfig, folder / "config.yaml")
    try:
        return config, tasks.get(config.task, record.get("task", {}))
    except TypeError as error:
        raise AdapterError(
            f"{folder / environment.FILE}: task is {record.get('task')!r}, which does not fit {config.task}: {error}."
        ) from None


def unlike(found: dict[str, Any], wanted: dict[str, Any], prefix: str = "") -> list[str]:
    """Returns what is wrong with the keys of `found`: `wanted` holds the type, or a union of types, of each."""
    problems = [f"{prefix}{key} is missing" for key in wanted if key not in found]
    return problems + [
        f"{prefix}{key} is {found[key]!r}, not {_kind(kind)}"
        for key, kind in wanted.items()
        if key in found and (not isinstance(found[key], kind) or (isinstance(found[key], bool) and kind is not bool))
    ]


def _kind(kind: Any) -> str:
    """Returns a type, or a union of types, in the words of JSON."""
    words = {str: "a string", dict: "an object", list: "a list", bool: "true or false", int: "a whole number"}
    words |= {float: "a number", type(None): "null"}
    return " or ".join(words[one] for one in get_args(kind) or (kind,))


@contextmanager
def _named(file: Path) -> Iterator[None]:
    """Turns what PEFT says of a configuration it cannot use into an error that names the file."""
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise AdapterError(f"{file}: PEFT cannot use it: {type(error).__name__}: {error}") from None


def find_base(record: dict[str, Any], base_name: str | None = None) -> sources.Source:
    """Returns the source of the base that an adapter is bound to, having compared the digest of its weights.

    Raises:
        AdapterError: the weights found are not those the adapter was trained on.
        SourceError: the base cannot be found; the message says how to name it.
    """
    source = sources.recall(record) if base_name is None else sources.resolve(base_name)
    digest = sources.weights_digest(source.folder)
    if digest != record["weights_sha256"]:
        raise AdapterError(
            f"This adapter belongs to {record['name']} ({record['origin']}) with weights "
            f"{record['weights_sha256'][:16]}, but {source.name} ({source.origin}) has weights {digest[:16]}: "
            "an adapter works on its own base only."
        )
    return source


def read_settings(folder: Path) -> dict[str, Any]:
    """Returns the contents of `adapter_config.json`. Raises AdapterError where the folder is no adapter."""
    if not folder.is_dir():
        raise AdapterError(f"{folder}: there is no such folder.")
    if not (folder / WEIGHTS).is_file() or not (folder / CONFIG).is_file():
        missing = CONFIG if (folder / WEIGHTS).is_file() else WEIGHTS
        raise AdapterError(f"{folder}: there is no {missing}, so this is not an adapter folder.")
    try:
        settings = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise AdapterError(f"{folder / CONFIG}: cannot be read: {error}.") from None
    if not isinstance(settings, dict):
        raise AdapterError(f"{folder / CONFIG}: it holds a {type(settings).__name__}, not an object.")
    return settings


def lora_settings(folder: Path) -> peft.LoraConfig:
    """Returns PEFT's configuration of the adapter in `folder`, to put it into a model before it is filled.

    Raises:
        AdapterError: the folder is no adapter, or its configuration was damaged or is not of LoRA.
    """
    settings = read_settings(folder)
    problems = unlike(settings, SETTINGS)
    if settings.get("peft_type", "LORA") != "LORA":
        problems.append(f"peft_type is {settings['peft_type']!r}, not LORA")
    if problems:
        raise AdapterError(f"{folder / CONFIG}: {'; '.join(problems)}: the file was damaged, or is not of lora-ft.")
    # `megatron_config` makes PEFT import whatever module `megatron_core` names.
    left_out = ("runtime_config", "megatron_config", "megatron_core")
    known = {k: v for k, v in settings.items() if k in peft.LoraConfig.__dataclass_fields__ and k not in left_out}
    # What is loaded is split into frozen and trained as it was in training; PEFT saves it as all frozen.
    with _named(folder / CONFIG):
        return peft.LoraConfig(**{**known, "init_lora_weights": True, "inference_mode": False})


def enlarge(model: PreTrainedModel, size: int) -> None:
    """Gives `model` embeddings for `size` tokens where it has fewer, the same on every load: nothing is drawn."""
    before = model.get_input_embeddings().weight.shape[0]
    if size <= before:
        return
    old = {id(t): t.data for t in _rows_of_tokens(model)}
    kept = [enlarged(t, size) for t in old.values()]
    model.resize_token_embeddings(size, mean_resizing=False)
    new = {id(t): t for t in _rows_of_tokens(model)}
    for parameter, value in zip(new.values(), kept, strict=True):
        parameter.data.copy_(value)
    model.requires_grad_(False)


def enlarged(rows: torch.Tensor, size: int) -> torch.Tensor:
    """Returns embeddings or output biases with `size` rows: the new ones the mean of the old, or zero for a bias."""
    more = size - len(rows)
    new = rows.new_zeros(more) if rows.ndim == 1 else rows.float().mean(dim=0).to(rows.dtype).expand(more, -1)
    return torch.cat([rows, new])


def _rows_of_tokens(model: PreTrainedModel) -> list[torch.nn.Parameter]:
    """Returns the parameters that have a row for each token: embeddings, and weight and bias of the output."""
    output = model.get_output_embeddings()
    found = [model.get_input_embeddings().weight, *(output.parameters() if output is not None else ())]
    return list({id(p): p for p in found}.values())


def _fill(model: peft.PeftModel, folder: Path) -> None:
    """Copies the tensors of the folder into the model; every name and shape must fit, none may be missing."""
    try:
        found = load_file(folder / WEIGHTS)
    except safetensors.SafetensorError as error:
        raise AdapterError(f"{folder / WEIGHTS}: cannot be read: {error}.") from None
    wanted = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    problems = [f"{name} is missing" for name in sorted(wanted.keys() - found.keys())]
    problems += [f"{name} has no place in the model" for name in sorted(found.keys() - wanted.keys())]
    problems += [
        f"{name} is {tuple(found[name].shape)}, the model needs {tuple(wanted[name].shape)}"
        for name in sorted(wanted.keys() & found.keys())
        if wanted[name].shape != found[name].shape
    ]
    if problems:
        shown = "\n".join(f"  {problem}" for problem in problems[:8])
        more = f"\n  ... and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise AdapterError(f"{folder / WEIGHTS} does not fit its base, {len(problems)} tensors differ:\n{shown}{more}")
    peft.set_peft_model_state_dict(model, found)


def _save_difference(start: dict[str, torch.Tensor], folder: Path, settings: dict[str, Any]) -> None:
    """Rewrites an adapter that moved its base as a plain one of twice the rank: [B, -B0] @ [A; A0]."""
    tensors = load_file(folder / WEIGHTS)
    for name, begun in start.items():
        begun = begun.to(tensors[name])
        if ".lora_A" in name:
            tensors[name] = torch.cat([tensors[name], begun], dim=0)
        else:
            tensors[name] = torch.cat([tensors[name], -begun], dim=1)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    growth = 2**0.5 if settings["use_rslora"] else 2
    settings.update(r=2 * settings["r"], lora_alpha=growth * settings["lora_alpha"])
    settings["rank_pattern"] = {name: 2 * rank for name, rank in settings["rank_pattern"].items()}
    settings["alpha_pattern"] = {name: growth * alpha for name, alpha in settings["alpha_pattern"].items()}


def _targets(base: Base, targets: tuple[str, ...]) -> str | list[str]:
    if targets == ("all-linear",):
        return "all-linear"
    names = [name for name, _ in base.model.named_modules()]
    unmatched = [t for t in targets if not any(n == t or n.endswith(f".{t}") for n in names)]
    if unmatched:
        layers = sorted(
            {name.rsplit(".", 1)[-1] for name, m in base.model.named_modules() if hasattr(m, "in_features")}
        )
        raise AdapterError(
            f"lora.targets: no module of {base.source.name} is called {', '.join(unmatched)}; "
            f"its linear layers are {', '.join(layers)}."
        )
    return list(targets)


def _token_rows(
    base: Base, added: tuple[str, ...], trained_tokens: tuple[str, ...]
) -> list[int] | dict[str, list[int]] | None:
    """Returns the ids of the embedding rows to train, having enlarged vocabulary and embeddings for those added.

    Where the output embeddings are not tied, an added token needs a row there too, or it could not be told apart
    from noise, nor be the same after a load.
    """
    tokenizer = base.tokenizer
    unknown = [t for t in trained_tokens if tokenizer.convert_tokens_to_ids(t) in (None, tokenizer.unk_token_id)]
    if unknown:
        raise AdapterError(
            f"lora.train-tokens: {', '.join(unknown)} is not in the vocabulary; add it with --data.special-tokens."
        )
    if added:
        # `add_special_tokens` would replace the list of those the tokenizer has.
        tokenizer.add_tokens(list(added), special_tokens=True)
        enlarge(base.model, len(tokenizer))
    rows = sorted(set(tokenizer.convert_tokens_to_ids([*added, *trained_tokens])))
    output = base.model.get_output_embeddings()
    if not rows or not added or output is None or environment.embeddings_are_tied(base.model):
        return rows or None
    inputs = base.model.get_input_embeddings()
    names = {id(module): name for name, module in base.model.named_modules()}
    return {names[id(inputs)]: rows, names[id(output)]: sorted(set(tokenizer.convert_tokens_to_ids(list(added))))}


def _correct_quantization_error(model: peft.PeftModel, base: Base) -> None:
    """Starts A and B so that s B A is the best correction of the NF4 error (Li et al. 2023, arXiv 2310.08659)."""
    inner = model.get_base_model()
    config = copy.deepcopy(inner.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        skeleton = type(inner)(config)
    weights = Weights(base.source.folder, skeleton, base.quant, base.dtype, set(base.left_whole))
    if weights.prequantized:
        raise AdapterError(
            f"lora.init=loftq needs the unquantized weights, but {base.source.name} is stored quantized."
        )
    layers = {n: m for n, m in inner.named_modules() if isinstance(m, LoraLayer) and n in weights.quantized}
    require(weights, [f"{name}.weight" for name in layers], base.source.name)
    with weights.opened() as reader, torch.no_grad():
        for name, layer in layers.items():
            whole = reader.original(f"{name}.weight").to(base.device).float()
            stored = dequantize_module_weight(layer.get_base_layer()).float()
            rank, scaling = layer.r["default"], layer.scaling["default"]
            error = (whole.T if name in weights.transposed else whole) - stored
            # More directions than are kept, for accuracy (Halko et al. 2011, arXiv 0909.4061, section 4.2).
            left, size, right = torch.svd_lowrank(error, q=min(rank + 10, *error.shape), niter=4)
            root = size[:rank].div(scaling).sqrt()
            layer.lora_A["default"].weight.copy_(root[:, None] * right.T[:rank])
            layer.lora_B["default"].weight.copy_(left[:, :rank] * root)
