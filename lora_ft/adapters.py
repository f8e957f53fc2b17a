"""Choose the layers and put LoRA in through PEFT."""

from __future__ import annotations

import copy
import hashlib
import logging
from collections.abc import Iterable
from typing import Any

import peft
import torch
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedModel, set_seed
from transformers.pytorch_utils import Conv1D

from lora_ft import base as bases
from lora_ft import fused
from lora_ft.base import Base
from lora_ft.config import LoraConfig
from lora_ft.errors import AdapterError
from lora_ft.foreign.adapter import refuse_patterns
from lora_ft.model import blocks
from lora_ft.model.four_bits import unpacked
from lora_ft.model.weights import Weights, require
from lora_ft.proof import environment
from lora_ft.tasks import Task

log = logging.getLogger(__name__)


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
    if config.init == "eva" and base.model.config.is_encoder_decoder:
        raise AdapterError(
            f"lora.init=eva: {base.source.name} is a {base.model.config.model_type} model, whose encoder and decoder "
            "read different texts; EVA starts models that read one: use another lora.init."
        )
    token_rows = _token_rows(base, special_tokens, config.train_tokens, config.save_modules)
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=_targets(base, config.targets),
        exclude_modules=[name for name, _ in base.model.named_modules() if bases.is_spare(name)] or None,
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
    refuse_patterns(vars(settings), base.model, base.source.name)
    fused.register(settings)
    # PEFT would write the folder that the weights were read from.
    base.model.name_or_path = settings.base_model_name_or_path
    set_seed(seed)
    try:
        model = peft.get_peft_model(base.model, settings)
    except ValueError as error:
        raise AdapterError(f"{base.source.name}: PEFT cannot adapt this model: {error}") from None
    if config.init == "eva":
        try:
            peft.initialize_lora_eva_weights(model, list(batches), prepare_layer_inputs_fn=_of_tokens)
        except AdapterError:
            raise
        except ValueError as error:
            raise AdapterError(f"lora.init=eva: PEFT cannot start this adapter from activations: {error}") from None
    in_float32(model)
    if config.init == "loftq":
        _correct_quantization_error(model, base)
    elif config.init in ("pissa", "olora"):
        if config.init == "olora":
            _refuse_transposed(model, base.source.name)
        # These moved the base by -s B A, so what is saved must say how far the adapter came from there.
        model.start = {k: t.clone() for k, t in peft.get_peft_model_state_dict(model).items() if ".lora_" in k}
        if any(".lora_embedding_" in name for name in model.start):
            raise AdapterError(
                f"lora.init={config.init} starts linear layers only: leave embeddings out of lora.targets."
            )
    blocks.compute_whole(model)
    fused.tell(model.get_base_model())
    blocks.tell(model.get_base_model())
    return model


def trained(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Returns the parameters that training changes, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def keep_as_reference(model: peft.PeftModel, task: Task) -> None:
    """Has a model that goes on from an adapter compared with it, as it is now, by a task that compares replies."""
    if task.statistics:
        model.reference = {name: parameter.detach().clone() for name, parameter in trained(model).items()}


def in_float32(model: torch.nn.Module) -> None:
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


def _of_tokens(layer_input: Any, places: torch.Tensor, name: str) -> torch.Tensor:
    """Returns what a layer was given at the places of tokens, for EVA. Raises AdapterError for a layer of whole rows.

    Args:
        places: row and column of each token that is no padding, int64 [N, 2].
    """
    given_BTH = layer_input if isinstance(layer_input, torch.Tensor) else layer_input[0]
    if given_BTH.ndim != 3:
        raise AdapterError(
            f"lora.init=eva: {name} is given one vector a row and not one a token, too few to start it from: "
            "name other layers in lora.targets, or use another lora.init."
        )
    return given_BTH[places.T.unbind()]


def _refuse_transposed(model: peft.PeftModel, name: str) -> None:
    """Raises AdapterError where a layer of the adapter holds its weight transposed, which OLoRA takes as it lies."""
    for place, layer in model.get_base_model().named_modules():
        if isinstance(layer, LoraLayer) and isinstance(layer.get_base_layer(), Conv1D):
            raise AdapterError(
                f"lora.init=olora: {place} of {name} is a Conv1D, whose weight lies transposed; PEFT starts only plain "
                "linear layers so: use --lora.init pissa, or leave it out of lora.targets."
            )


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
    base: Base, added: tuple[str, ...], trained_tokens: tuple[str, ...], saved_whole: tuple[str, ...]
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
    embedding = base.model.get_input_embeddings()
    whole = [name for name, module in base.model.named_modules() if module is embedding and name.endswith(saved_whole)]
    if whole and (added or trained_tokens):
        raise AdapterError(
            f"lora.save-modules trains all of {whole[0]}, so no rows of it can be trained alone: leave it out, or "
            "leave out lora.train-tokens and data.special-tokens."
        )
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
            packed = layer.get_base_layer().weight
            stored = unpacked(packed, packed.quant_state).float()
            rank, scaling = layer.r["default"], layer.scaling["default"]
            error = (whole.T if name in weights.transposed else whole) - stored
            # More directions than are kept, for accuracy (Halko et al. 2011, arXiv 0909.4061, section 4.2).
            left, size, right = torch.svd_lowrank(error, q=min(rank + 10, *error.shape), niter=4)
            root = size[:rank].div(scaling).sqrt()
            layer.lora_A["default"].weight.copy_(root[:, None] * right.T[:rank])
            layer.lora_B["default"].weight.copy_(left[:, :rank] * root)
