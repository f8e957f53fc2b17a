"""What each refusal must say: a hostile file that is refused for another reason tries another guard than is meant."""

from __future__ import annotations

import re

# What a case is called -> what is said of it, both regular expressions; the first that fits holds.
PHRASES: tuple[tuple[str, str], ...] = (
    # Headers of safetensors.
    (r"header of (2\^|.*longer)|header longer|cut short$|more behind|nothing in it|a pickle called", "or cut short"),
    (r"header of (spaces|a million)|100 GB", "its header has [0-9,]+ bytes"),
    (r"header (that ends early|nested deep|that is)", "its header "),
    (r"safetensors: a name twice", "twice in one object"),
    (r"offsets that overlap|offsets behind|a shape that overflows", "bytes of data, but its shape calls for|overlaps"),
    (r"offsets |one offset", "has data_offsets that are none"),
    (r"an unknown dtype|a dtype that", "which is none of safetensors"),
    (r"a shape (below|of a thousand|of truths)", "a shape that is none"),
    (r"no shape", "is not described by dtype, shape"),
    (r"metadata that is no text", "metadata in its header is not text"),
    (r"a name (with a path|that turns|of control)", "is no name of a tensor"),
    (r"a name of 10,000|an empty name", "is a name of [0-9]+ characters"),
    # Files that can run code, or lead elsewhere.
    (r"weights in a \.|an index that names a pickle", "which can run code when opened"),
    (r"an index that names", "there is no weight file"),
    (r"an index nested deep", "nested deeper"),
    (r"transformers_weights outside", "not the files that are checked"),
    (
        r"is a link to|a shard that is a link|link to a device",
        "is a link out|no plain file|cannot be read|there is no|has no",
    ),
    (r"is a pipe", "no plain file|there is no|has no config"),
    # JSON that is none.
    (r": nested \d+ deep|nested deep$", "nested (deeper|too deep)|no tokenizer"),
    (r"json: a key twice", "twice"),
    (r"json: NaN", "NaN"),
    (r"json: a number of 5,000 digits", "beyond 64 bits"),
    (r"json: 6 MB", "bytes; such a file has"),
    (r"json: not UTF-8", "is not UTF-8"),
    (r"json: a list", "holds a list"),
    (r"json: cut", "is not JSON"),
    (r"json: half a surrogate", "half of a surrogate"),
    # Adapters.
    (r"a tensor that is", "are not finite"),
    (r"a tensor of another rank", "the model needs"),
    (r"a tensor too many", "has no place in the model"),
    (r"a tensor too few", "is missing"),
    (r"put on another base", "belongs to"),
    (
        r"adapter_config.json: (layers_pattern|exclude_modules|arrow_config|__class__|key)",
        "is no setting that lora-ft loads",
    ),
    (r"adapter_config.json: (auto_mapping|megatron|corda|lora_ga|eva|loftq|layer_repl)", "may not ask for"),
    (r"adapter_config.json: (rank|alpha)_pattern", "its patterns|no module of the base|_pattern is"),
    (r"adapter_config.json: target_modules", "its patterns|no module of the base|target_modules is|PEFT cannot use"),
    (r"adapter_config.json: modules_to_save", "no module of the base|modules_to_save is"),
    (r"environment.json: base=", r"base\.weights_sha256 is|base is|belongs to|64 hexadecimal|has not seen|looked for"),
    # Bases.
    (r"config.json: _?(attn|experts|text_config|decoder)", "names code to fetch"),
    (r"config.json: (trust|vision)", "no code from a base is ever run"),
    (
        r"config.json: (model_type|architectures)",
        "model_type is missing|does not know this model|out of scope|has no CausalLM",
    ),
    (r"config.json: (num_hidden_layers|num_labels)", "is the most of any model|are not there|is not there|calls for"),
    (r"config.json: quantization_config", "quantization|is stored as"),
    (r"config.json: (rope_scaling|hidden_act)", "does not know this model|describes no model|cannot load"),
    (
        r"config.json: (vocab|hidden|intermediate|num_attention)",
        "does not know this model|describes no model|calls for|of another shape|cannot load|not there",
    ),
    (r"a base with an adapter in it", "holds adapter_config.json beside"),
    (r"a weight that is not a number", "holds what is no number"),
    (r"a weight of another shape", "of another shape|cannot load"),
    (r"a weight too few", "not there"),
    # Tokenizers.
    (r"tokenizer_config.json: auto_map", "no code from a base is ever run|no tokenizer"),
    (r"tokenizer_config.json: trust", "no code from a base is ever run"),
    (r"tokenizer_config.json: added_tokens_decoder", "has no tokenizer that transformers can read"),
    (r"tokenizer_config.json: chat_template", "chat_template"),
    (r"^\w+: tokenizer.json of", "cannot be read|has no tokenizer"),
    (r"chat_template.jinja of", "bytes; such a file has|is not UTF-8"),
    # Any other setting is named.
    (r"json: (?P<key>\w+)=", r"\g<key>"),
    # Programs.
    (r"^template: ", "[Tt]emplate"),
    (r"python/|a tag of its own", "could not determine a constructor"),
    (r"billion laughs|an alias|merges of merges", r"aliases|recursive|(run|config)\.yaml"),
    (r"(^config|yaml): a token", "holds a secret"),
    (r"(^config|yaml): ", r"(run|config)\.yaml"),
)


def phrase_of(kind: str, name: str) -> str:
    """Returns what must be said of a case of that name. Raises LookupError where nothing is laid down."""
    for case, told in PHRASES:
        if found := re.search(case, f"{kind}: {name}"):
            return found.expand(told) if "\\g" in told else told
    raise LookupError(f"{kind}: {name}: nothing is laid down of what its refusal must say")
