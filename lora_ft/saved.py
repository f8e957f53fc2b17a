"""An adapter folder: written, read, and put on its base again."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lora_ft import adapters, fused, sources, tasks
from lora_ft import base as bases
from lora_ft.base import Base
from lora_ft.config import RunConfig
from lora_ft.errors import AdapterError, LoraFtError
from lora_ft.foreign import adapter as foreign
from lora_ft.foreign import tensors
from lora_ft.foreign.files import PICKLES, WHY_NO_PICKLE, object_of, refuse_links_out
from lora_ft.foreign.reading import first_line
from lora_ft.foreign.strictjson import shown
from lora_ft.model import blocks, four_bits
from lora_ft.proof import environment, recorded
from lora_ft.system import atomicio

log = logging.getLogger(__name__)

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
# Where the files of an adapter are, all of them or none, before they are moved into its folder.
STAGED = "staged-adapter"

# What `load` and `merge` read of PEFT's file, and of which type each must be.
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
# What tensors of an adapter may be, as safetensors names it.
FLOATS = ("F32", "BF16", "F16")
# Tokens that an adapter's tokenizer may have without rows for them; every one takes a row of the base's embeddings.
FEW_TOKENS = 1024


def save(model: peft.PeftModel, folder: Path) -> None:
    """Writes `adapter_model.safetensors` and `adapter_config.json` into a folder, each of them whole or not at all.

    Raises:
        AdapterError: a tensor of the adapter is not finite; such an adapter is never saved.
        StorageError: the disk is full, or the folder cannot be written to.
    """
    staged = folder / STAGED
    if staged.exists():
        atomicio.remove(staged)
    with atomicio.folder(staged, {}) as draft:
        write(model, draft)
    atomicio.move_in(staged, folder, last=WEIGHTS)


def write(model: peft.PeftModel, draft: atomicio.Draft) -> None:
    """Writes the two files of the adapter into a draft: plain PEFT, with the same bytes every time.

    Raises:
        AdapterError: a tensor of the adapter is not finite; such an adapter is never saved.
        StorageError: the disk is full, or the folder cannot be written to.
    """
    broken = [name for name, p in adapters.trained(model).items() if not torch.isfinite(p).all()]
    if broken:
        raise AdapterError(f"{broken[0]} and {len(broken) - 1} more adapter tensors are not finite; nothing was saved.")
    # Added tokens are saved as rows, so the whole embedding matrix need not be.
    draft.library(lambda folder: model.save_pretrained(folder, safe_serialization=True, save_embedding_layers=False))
    draft.remove("README.md")  # PEFT's card, full of placeholders; ours comes with the report
    settings = json.loads((draft.path / CONFIG).read_text(encoding="utf-8"))
    # A and B are in the file, so whoever loads it must not start them anew.
    settings.update(init_lora_weights=True, eva_config=None)
    if hasattr(model, "start"):
        _write_difference(model.start, draft, settings)
    # PEFT turns sets into lists in hash order.
    for key, value in settings.items():
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            settings[key] = sorted(value)
    draft.write_json(CONFIG, settings, sort_keys=True)


@dataclass
class Loaded:
    """An adapter on its base, ready to use, and the record of the run that made it."""

    folder: Path
    base: Base
    model: peft.PeftModel
    task: tasks.Task
    config: RunConfig
    record: dict[str, Any]

    def prepare_task(self) -> None:
        """Prepares the task for rows as long as those of the run."""
        asked = self.config.data.max_length
        self.task.prepare(self.base.tokenizer, bases.longest_row(self.base.source, self.task.model_class, asked))


def load(folder: Path, base_name: str | None = None, device: str | None = None) -> Loaded:
    """Returns the adapter in `folder` on the base that it was made on, in evaluation mode.

    Args:
        base_name: where to find the base, when it has moved; its weights must be the recorded ones.

    Raises:
        AdapterError: the folder is incomplete, the base's weights are others, or tensors do not fit.
        SourceError: the base cannot be found.
    """
    record = recorded.read(folder)
    settings = lora_settings(folder)
    foreign.refuse_names(tensors.header(folder / WEIGHTS, AdapterError)[1], folder / WEIGHTS)
    config, task = recorded.task(folder, record)
    source = find_base(folder, record["base"], base_name)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = _dtype(record["dtype"], device)
    base = bases.load(
        source,
        quant=record["quant"],
        model_class=task.model_class,
        dtype=dtype,
        device=device,
        seed=config.train.seed,
        config_changes=task.config_changes(),
        why_dtype="as in the run" if dtype == record["dtype"] else "in place of the run's",
    )
    base.tokenizer = load_tokenizer(folder, record)
    _check_vocabulary(base, settings, folder)
    adapters.enlarge(base.model, len(base.tokenizer))
    _compare(_outline(base, task, folder), folder)
    fused.register(settings)
    model = inject(base.model, settings, folder)
    adapters.in_float32(model)
    fill(model, folder)
    model.eval()
    four_bits.keep_in_place(model)
    blocks.compute_whole(model)
    return Loaded(folder, base, model, task, config, record)


def add(loaded: Loaded, folder: Path, settings: peft.LoraConfig, name: str) -> None:
    """Puts the adapter in another folder, of the same base and task, beside those in the model.

    Raises:
        AdapterError: tensors do not fit, PEFT cannot use its settings with this model, or would take forever to.
    """
    foreign.refuse_names(tensors.header(folder / WEIGHTS, AdapterError)[1], folder / WEIGHTS)
    _compare(_outline(loaded.base, loaded.task, folder), folder)
    # The names are more by those of the adapters that are there.
    foreign.refuse_patterns(vars(settings), loaded.model, str(folder / CONFIG))
    with _named(folder / CONFIG):
        loaded.model.add_adapter(name, settings)
    fill(loaded.model, folder, name)


def _check_vocabulary(base: Base, settings: peft.LoraConfig, folder: Path) -> None:
    """Raises AdapterError where the adapter trains tokens that are none, or adds more than it has rows for."""
    size, rows = len(base.tokenizer), base.model.get_input_embeddings().weight.shape[0]
    specs = tensors.header(folder / WEIGHTS, AdapterError)[1].values()
    longest = max((spec["shape"][0] for spec in specs if spec["shape"]), default=0)
    if size - rows > max(FEW_TOKENS, longest):
        raise AdapterError(
            f"{folder}: its tokenizer has {size:,} tokens, its base {rows:,}, and the adapter no rows for so many more."
        )
    indices = settings.trainable_token_indices or {}
    for name, listed in (indices if isinstance(indices, dict) else {"": indices}).items():
        beyond = [index for index in listed if not 0 <= index < max(size, rows)]
        if beyond:
            raise AdapterError(
                f"{folder / CONFIG}: trainable_token_indices{f' of {shown(name)}' if name else ''} has {beyond[0]}, "
                f"which is none of the {max(size, rows):,} tokens: the file was damaged, or is of another base."
            )


def _outline(base: Base, task: tasks.Task, folder: Path) -> peft.PeftModel:
    """Returns the base with the adapter of `folder` in it, on the meta device: no rank takes memory there."""
    config = copy.deepcopy(base.model.config)
    # Of a base that is stored quantized; what is put into it has the same shapes on plain layers.
    vars(config).pop("quantization_config", None)
    with torch.device("meta"):
        outline = task.model_class.from_config(config)
        outline.tie_weights()
        return inject(outline, lora_settings(folder), folder)


def _dtype(of_run: str, device: str) -> str:
    """Returns the dtype that the run computed in, or where the GPU lacks bfloat16 the one that replaces it."""
    if of_run != "bfloat16" or not device.startswith("cuda"):
        return of_run
    possible, why = bases.choose_dtype("auto", device)
    name = str(possible).removeprefix("torch.")
    if name != of_run:
        log.info("the adapter was trained in %s, but is used in %s: %s", of_run, name, why)
    return name


@contextmanager
def _named(file: Path) -> Iterator[None]:
    """Turns what PEFT says of a configuration it cannot use into an error that names the file."""
    try:
        yield
    except LoraFtError:
        raise
    # PEFT checks little: a name of the wrong kind of module, or a size that does not fit, raises what it comes upon.
    except Exception as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise AdapterError(f"{file}: PEFT cannot use it: {type(error).__name__}: {first_line(error)}.") from None


def find_base(folder: Path, record: dict[str, Any], base_name: str | None = None) -> sources.Source:
    """Returns the source of the base that an adapter is bound to, having compared the digest of its weights.

    Args:
        record: the part `base` of the record in `folder`.

    Raises:
        AdapterError: the weights found are not those the adapter was trained on.
        SourceError: the base cannot be found; the message says how to name it.
    """
    source = sources.recall(record) if base_name is None else sources.resolve(base_name)
    require_base(folder, record, source)
    return source


def require_base(folder: Path, record: dict[str, Any], source: sources.Source) -> None:
    """Raises AdapterError where a base is not the one that the adapter in `folder` was trained on, saying what differs.

    Args:
        record: the part `base` of the record in `folder`.
    """
    digest = sources.weights_digest(source.folder)
    if digest != record["weights_sha256"]:
        differing = "".join(f"\n  {line}" for line in _differences(folder, source.folder))
        raise AdapterError(
            f"This adapter belongs to {record['name']} ({record['origin']}) with weights "
            f"{record['weights_sha256'][:16]}, but {source.name} ({source.origin}) has weights {digest[:16]}: "
            f"an adapter works on its own base only. What differs:{differing}"
        )
    _compare_configs(record, source)


def _compare_configs(record: dict[str, Any], source: sources.Source) -> None:
    """Raises AdapterError where the base computes something else with the weights that the adapter was made on."""
    was, now = record.get("config_sha256"), sources.config_digest(source.folder)
    if was is None:
        # Refusing them would take away adapters that nothing is wrong with; their seal replays what they say.
        log.info(
            "%s is bound to the weights of its base only, as adapters once were: verify shows what it does", source.name
        )
    elif was != now and "dequantized" in source.origin:
        log.warning(
            "config.json of %s is not the one the adapter was made on: another transformers wrote it", source.name
        )
    elif was != now:
        raise AdapterError(
            f"This adapter belongs to {record['name']} with config.json {was[:16]}, but that of {source.name} "
            f"({source.origin}) is {now[:16]}: with the same weights it computes something else. Put back the "
            "config.json of then, or name a copy of the base that has it with --base."
        )


def load_tokenizer(folder: Path, record: dict[str, Any]) -> PreTrainedTokenizerBase:
    """Returns the tokenizer in an adapter folder, which is used and not its base's.

    Raises:
        AdapterError: it is not the one that was saved with the adapter; other versions of tokenizers may tell its rules
            in other words, which is only warned of.
    """
    tokenizer = bases.load_tokenizer(folder)
    was, version = record.get("tokenizer_sha256"), record.get("versions", {}).get("tokenizers")
    if was is not None and was != environment.tokenizer_sha256(tokenizer):
        told = f"{folder}: its tokenizer or chat template is not the one the adapter was saved with"
        if version == environment.versions().get("tokenizers"):
            raise AdapterError(f"{told}, so words would become other tokens: put back the files of then.")
        log.warning("%s, or tokenizers %s told it in other words", told, version)
    return tokenizer


def _differences(folder: Path, base: Path) -> list[str]:
    """Returns in what the base differs from the one that the adapter was made on, as far as the files tell."""
    held: dict[str, list[int]] = {}
    for file in sources.safetensors_files(base):
        held |= {name: spec["shape"] for name, spec in sources.safetensors_header(file)[1].items()}
    made = {name: spec["shape"] for name, spec in tensors.header(folder / WEIGHTS, AdapterError)[1].items()}
    found = []
    for name, shape in sorted(made.items()):
        module, _, part = name.removeprefix("base_model.model.").partition(".lora_")
        if part not in ("A.weight", "B.weight"):
            continue
        # Some files leave out the first part of a name.
        stored = next((held[n] for n in (f"{module}.weight", f"{module.partition('.')[2]}.weight") if n in held), None)
        width, side = (shape[1], "inputs") if part == "A.weight" else (shape[0], "outputs")
        if stored is None:
            found.append(f"{module}: the adapter changes it, and this base has none")
        elif width not in stored:
            found.append(f"{module}: the adapter is made for {width} {side}, this base's weight is {stored}")
    found = list(dict.fromkeys(found))
    if not found:
        return ["the numbers in the weights; the layers that the adapter changes have the same names and sizes"]
    return [*found[:8], *([f"... and {len(found) - 8} more"] if found[8:] else [])]


def read_settings(folder: Path) -> dict[str, Any]:
    """Returns the contents of `adapter_config.json`. Raises AdapterError where the folder is no adapter."""
    if not folder.is_dir():
        raise AdapterError(f"{folder}: there is no such folder.")
    if not (folder / WEIGHTS).is_file() or not (folder / CONFIG).is_file():
        missing = CONFIG if (folder / WEIGHTS).is_file() else WEIGHTS
        pickles = sorted(f.name for f in folder.iterdir() if f.suffix in PICKLES) if missing == WEIGHTS else []
        only = f" It holds {pickles[0]}, {WHY_NO_PICKLE}: only safetensors are loaded." if pickles else ""
        raise AdapterError(f"{folder}: there is no {missing}, so this is not an adapter folder.{only}")
    refuse_links_out(folder, AdapterError)
    return object_of(folder / CONFIG, AdapterError)


def lora_settings(folder: Path) -> peft.LoraConfig:
    """Returns PEFT's configuration of the adapter in `folder`, to put it into a model before it is filled.

    Raises:
        AdapterError: the folder is no adapter, or its configuration was damaged or is not of LoRA.
    """
    settings = read_settings(folder)
    problems = recorded.unlike(settings, SETTINGS)
    if settings.get("peft_type", "LORA") != "LORA":
        problems.append(f"peft_type is {shown(settings['peft_type'])}, not LORA")
    if problems:
        raise AdapterError(f"{folder / CONFIG}: {'; '.join(problems)}: the file was damaged, or is not of lora-ft.")
    known = foreign.checked(settings, folder / CONFIG)
    # What is loaded is split into frozen and trained as it was in training; PEFT saves it as all frozen.
    with _named(folder / CONFIG):
        return peft.LoraConfig(**{**known, "init_lora_weights": True, "inference_mode": False})


def inject(model: PreTrainedModel, settings: peft.LoraConfig, folder: Path) -> peft.PeftModel:
    """Returns the model with the adapter that the settings of `folder` describe in it, not filled yet.

    Raises:
        AdapterError: PEFT cannot use the settings with this model, or would take forever to.
    """
    foreign.refuse_patterns(vars(settings), model, str(folder / CONFIG))
    # Else PEFT warns that it renames the base.
    model.name_or_path = settings.base_model_name_or_path
    with _named(folder / CONFIG):
        return peft.get_peft_model(model, settings)


def _compare(model: peft.PeftModel, folder: Path, name: str = "default") -> None:
    """Raises AdapterError where names, shapes or dtypes in the file's header are not those that the model needs."""
    wanted = peft.get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    # The header alone, so that nothing is read of a file that does not fit.
    held = tensors.header(folder / WEIGHTS, AdapterError)[1]
    shapes = {name: tuple(spec["shape"]) for name, spec in held.items()}
    problems = [f"{name} is missing" for name in sorted(wanted.keys() - shapes.keys())]
    problems += [f"{name} has no place in the model" for name in sorted(shapes.keys() - wanted.keys())]
    problems += [
        f"{name} is {shapes[name]}, the model needs {tuple(wanted[name].shape)}"
        for name in sorted(wanted.keys() & shapes.keys())
        if tuple(wanted[name].shape) != shapes[name]
    ]
    # Others become something else without a word: whole numbers lose their fractions, complex ones a half.
    problems += [
        f"{name} is of {spec['dtype']}, not {', '.join(FLOATS)}"
        for name, spec in sorted(held.items())
        if spec["dtype"] not in FLOATS
    ]
    if problems:
        told = "\n".join(f"  {problem}" for problem in problems[:8])
        more = f"\n  ... and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise AdapterError(f"{folder / WEIGHTS} does not fit its base, {len(problems)} tensors differ:\n{told}{more}")


def fill(model: peft.PeftModel, folder: Path, name: str = "default") -> None:
    """Copies the tensors of the folder into an adapter of the model.

    Args:
        name: what the model calls that adapter.

    Raises:
        AdapterError: a name, shape or dtype does not fit, or a number is not finite.
    """
    _compare(model, folder, name)
    peft.set_peft_model_state_dict(model, tensors.load(folder / WEIGHTS, AdapterError), adapter_name=name)
    # What the model has, in its dtype, and not what the file has.
    held = peft.get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    broken = [name for name, tensor in sorted(held.items()) if not torch.isfinite(tensor).all()]
    if broken:
        more = f" and {len(broken) - 1} more tensors" if broken[1:] else ""
        raise AdapterError(f"{folder / WEIGHTS}: {broken[0]}{more} are not finite: the file was damaged.")


def _write_difference(start: dict[str, torch.Tensor], draft: atomicio.Draft, settings: dict[str, Any]) -> None:
    """Rewrites an adapter that moved its base as a plain one of twice the rank: [B, -B0] @ [A; A0]."""
    held = load_file(draft.path / WEIGHTS)
    for name, begun in start.items():
        begun = begun.to(held[name])
        if ".lora_A" in name:
            held[name] = torch.cat([held[name], begun], dim=0)
        else:
            held[name] = torch.cat([held[name], -begun], dim=1)
    draft.tensors(WEIGHTS, held, {"format": "pt"})
    growth = 2**0.5 if settings["use_rslora"] else 2
    settings.update(r=2 * settings["r"], lora_alpha=growth * settings["lora_alpha"])
    settings["rank_pattern"] = {name: 2 * rank for name, rank in settings["rank_pattern"].items()}
    settings["alpha_pattern"] = {name: growth * alpha for name, alpha in settings["alpha_pattern"].items()}
