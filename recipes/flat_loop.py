"""The same training as `recipes/chat.py` with no abstractions: read it top to bottom, change anything.

    python recipes/flat_loop.py your.jsonl runs/flat [BASE]

Rows are in any format of the library but labels; of a conversation the last answer is learned. It quantizes the base
to NF4, trains LoRA with accumulation weighted by tokens, and saves a plain PEFT adapter. What it leaves out is what
the library adds: the mask contract, the seal, resuming, merging, evaluation.
"""

import math
import random
import sys
import time

import jinja2
import peft
import torch
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from lora_ft.data import formats
from lora_ft.data.examples import Chat, Pair, Text
from lora_ft.sources import resolve

BASE = "smollm2-135m"
RANK, ALPHA = 16, 32
MAX_LENGTH = 512
BATCH, ACCUMULATE, EPOCHS = 2, 4, 1
LR, WARMUP, CLIP, SEED = 5e-4, 0.05, 1.0, 42
IGNORE = -100


def encode(tokenizer, row):
    """Returns token ids and labels of a row, whole: the answer and its end are trained, the prompt is not."""
    if isinstance(row, Text):
        ids, end = tokenizer(row.text)["input_ids"], [tokenizer.eos_token_id]
        ids += end if ids[-1:] != end else []
        return ids, [IGNORE, *ids[1:]]
    if isinstance(row, Pair):
        messages, answer, tools = [{"role": "user", "content": row.prompt}], row.completion, None
    elif isinstance(row, Chat):
        *messages, last = row.messages
        answer, tools = last["content"], list(row.tools) or None
        if last["role"] != "assistant" or last.get("weight") == 0 or "tool_calls" in last:
            raise ValueError("it does not end in an answer in words to train on")
        if any("tool_calls" in message for message in messages) and "tool_calls" not in str(tokenizer.chat_template):
            raise ValueError("the base's chat template does not write its tool calls")
    else:
        raise ValueError("a label is nothing to write; use the task classify")
    prompt = tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=True, return_dict=False)
    if tools and prompt == tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False):
        raise ValueError("the base's chat template does not write its tools")
    reply = tokenizer(answer + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
    return prompt + reply, [IGNORE] * len(prompt) + reply


def read(tokenizer, path):
    """Returns the rows cut to MAX_LENGTH, having said which were cut or left out, and why."""
    rows, cut, lost = [], 0, 0
    for row in formats.read(path):
        try:
            ids, labels = encode(tokenizer, row)
        except (ValueError, TypeError, jinja2.TemplateError) as error:  # what templates raise
            print(f"{row.where}: left out: {error}")
            continue
        if all(label == IGNORE for label in labels[:MAX_LENGTH]):
            print(f"{row.where}: left out: of its {len(ids)} tokens, the first {MAX_LENGTH} hold nothing to train on")
            continue
        cut, lost = cut + (len(ids) > MAX_LENGTH), lost + max(0, len(ids) - MAX_LENGTH)
        rows.append((ids[:MAX_LENGTH], labels[:MAX_LENGTH]))
    print(f"{len(rows)} rows, of which {cut} were cut at {MAX_LENGTH} tokens and lost {lost} in all")
    return rows or sys.exit(f"{path}: no row is left to train on")


def collate(rows, pad_id, device):
    """Returns ids, attention mask and labels, each int64 [B, T], padded on the right."""
    longest = max(len(ids) for ids, _ in rows)
    ids = [r + [pad_id] * (longest - len(r)) for r, _ in rows]
    mask = [[1] * len(r) + [0] * (longest - len(r)) for r, _ in rows]
    labels = [y + [IGNORE] * (longest - len(y)) for _, y in rows]
    return (torch.tensor(values, device=device) for values in (ids, mask, labels))


def main(data, out, base=BASE):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    native = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16 if native else torch.float16

    # The frozen base, 4 bits a weight.
    folder = resolve(base).folder
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = read(tokenizer, data)
    double = {"bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": dtype}
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", **double)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map=device, quantization_config=nf4)
    for module in model.modules():  # an evaluation pass must not repack weights in place (AVX512-BF16 processors)
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False

    # The adapter, in float32; the seed comes first, or the same seed gives another run.
    torch.manual_seed(SEED)
    lora = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, lora).train()
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=LR, weight_decay=0.0)
    scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)  # float16 rounds small gradients to 0
    per_step = BATCH * ACCUMULATE
    steps = EPOCHS * math.ceil(len(rows) / per_step)
    warmup = max(1, round(WARMUP * steps))
    schedule = LambdaLR(optimizer, lambda s: min((s + 1) / warmup, (steps - s) / max(1, steps - warmup)))

    step, tokens, began = 0, 0, time.perf_counter()
    for epoch in range(EPOCHS):
        order = random.Random(SEED + epoch).sample(rows, len(rows))
        for start in range(0, len(order), per_step):
            chosen = order[start : start + per_step]
            # One mean over all labels of the step: the gradient does not depend on how rows are split up.
            labelled = sum(label != IGNORE for _, labels in chosen for label in labels[1:])
            total = 0.0
            for at in range(0, len(chosen), BATCH):
                ids, mask, labels = collate(chosen[at : at + BATCH], tokenizer.pad_token_id or 0, device)
                # The head runs only at positions that some row learns from.
                kept = (labels[:, 1:] != IGNORE).any(0).nonzero()[:, 0]
                with torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
                    logits = model(input_ids=ids, attention_mask=mask, logits_to_keep=kept, use_cache=False).logits
                targets = labels[:, 1:][:, kept].flatten()
                loss = cross_entropy(logits.float().flatten(0, 1), targets, ignore_index=IGNORE, reduction="sum")
                scaler.scale(loss / labelled).backward()
                total += loss.item() / labelled
                tokens += int(mask.sum())
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(params, CLIP)
            scaler.step(optimizer)
            scaler.update()
            schedule.step()
            optimizer.zero_grad()
            step += 1
            speed = tokens / (time.perf_counter() - began)
            print(f"step {step}/{steps}  loss {total:.4f}  {speed:.0f} tokens/s", flush=True)

    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    print(f"{out}: saved")


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit(f"usage: {sys.argv[0]} ROWS OUT [BASE]")
    main(*sys.argv[1:])
