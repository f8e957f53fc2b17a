"""The same training as `recipes/chat.py` with no abstractions: read it top to bottom, change anything.

    python recipes/flat_loop.py your.jsonl runs/flat

Rows are `{"messages": [...]}`, `{"instruction", "input", "output"}` or `{"prompt", "completion"}`. It quantizes the
base to NF4, trains LoRA with accumulation weighted by tokens, and saves a plain PEFT adapter. What it leaves out is
what the library adds: the mask contract, the seal, resuming, merging, evaluation.
"""

import json
import math
import random
import sys
import time
from pathlib import Path

import peft
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from lora_ft.sources import resolve

BASE = "smollm2-135m"
RANK, ALPHA = 16, 32
MAX_LENGTH = 512
BATCH, ACCUMULATE, EPOCHS = 2, 4, 1
LR, WARMUP, CLIP, SEED = 5e-4, 0.05, 1.0, 42
IGNORE = -100


def read(path):
    """Returns the rows of a JSONL file or JSON list as (prompt, answer)."""
    text = Path(path).read_text(encoding="utf-8")
    rows = (
        json.loads(text) if text.lstrip().startswith("[") else [json.loads(x) for x in text.splitlines() if x.strip()]
    )
    for row in rows:
        if "messages" in row:
            yield row["messages"][:-1], row["messages"][-1]["content"]
        elif "instruction" in row:
            asked = "\n\n".join(part for part in (row["instruction"], row.get("input")) if part)
            yield [{"role": "user", "content": asked}], row["output"]
        else:
            yield [{"role": "user", "content": row["prompt"]}], row["completion"]


def encode(tokenizer, messages, answer):
    """Returns token ids and labels of one row: the answer and its end of turn are trained, the prompt is not."""
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    reply = tokenizer(answer + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
    ids = (prompt + reply)[:MAX_LENGTH]
    return ids, ([IGNORE] * len(prompt) + reply)[:MAX_LENGTH]


def collate(rows, pad_id):
    """Returns ids, attention mask and labels, each int64 [B, T], padded on the right."""
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([r + [pad_id] * (longest - len(r)) for r, _ in rows])
    mask = torch.tensor([[1] * len(r) + [0] * (longest - len(r)) for r, _ in rows])
    labels = torch.tensor([y + [IGNORE] * (longest - len(y)) for _, y in rows])
    return ids, mask, labels


def main(data, out):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32

    # The frozen base, 4 bits a weight.
    folder = resolve(BASE).folder
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        device_map={"": device},
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        ),
    )
    for module in model.modules():  # an evaluation pass must not repack weights in place (AVX512-BF16 processors)
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False

    # The adapter; the seed comes first, or the same seed gives another run.
    torch.manual_seed(SEED)
    model = peft.get_peft_model(
        model, peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    model.train()

    rows = [encode(tokenizer, messages, answer) for messages, answer in read(data)]
    rows = [row for row in rows if any(label != IGNORE for label in row[1])]
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=LR, weight_decay=0.0)
    per_step = BATCH * ACCUMULATE
    steps = EPOCHS * math.ceil(len(rows) / per_step)
    warmup = max(1, round(WARMUP * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / warmup, (steps - s) / max(1, steps - warmup))
    )

    step, tokens, began = 0, 0, time.perf_counter()
    for epoch in range(EPOCHS):
        order = list(range(len(rows)))
        random.Random(SEED + epoch).shuffle(order)
        for start in range(0, len(order), per_step):
            chosen = [rows[i] for i in order[start : start + per_step]]
            # One mean over all labels of the step: the gradient does not depend on how rows are split up.
            labelled = sum(label != IGNORE for _, labels in chosen for label in labels[1:])
            total = 0.0
            for at in range(0, len(chosen), BATCH):
                ids, mask, labels = (x.to(device) for x in collate(chosen[at : at + BATCH], tokenizer.pad_token_id))
                # The head runs only at positions that some row learns from.
                kept = (labels[:, 1:] != IGNORE).any(0).nonzero()[:, 0]
                with torch.autocast(device, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
                    logits = model(input_ids=ids, attention_mask=mask, logits_to_keep=kept, use_cache=False).logits
                targets = labels[:, 1:][:, kept]
                loss = cross_entropy(
                    logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum"
                )
                (loss / labelled).backward()
                total += loss.item() / labelled
                tokens += int(mask.sum())
            torch.nn.utils.clip_grad_norm_(params, CLIP)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            step += 1
            print(
                f"step {step}/{steps}  loss {total:.4f}  {tokens / (time.perf_counter() - began):.0f} tokens/s",
                flush=True,
            )

    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    print(f"{out}: saved")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(f"usage: {sys.argv[0]} ROWS.jsonl OUT")
    main(sys.argv[1], sys.argv[2])
