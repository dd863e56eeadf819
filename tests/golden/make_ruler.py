"""Regenerate `ruler.json` from a checkout of RULER's official repository.

    python tests/golden/make_ruler.py RULER [--out FILE]

README.md names the commit. None of the official code is here: the scripts that generate and score are imported from a
copy of the checkout, after their SHA-256 was checked, and run as they are, with these around them:

- the texts of `tests/ruler_data.py` in place of essays, SQuAD, HotpotQA and the list of English words;
- a tokenizer of words and signs, and for `sent_tokenize` a cut behind `.`, `?` and `!` (NLTK's needs a download);
- both random generators set back to the seed before each prompt, so that a prompt does not hang on what was tried
  before it.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import importlib.util
import json
import random
import re
import shutil
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import numpy as np
import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))
import ruler_data

COMMIT = "c3f5e3b4f87f97e048793bb510a3a6b19a46bf3a"
GENERATORS = "scripts/data/synthetic"
SHA256 = {
    f"{GENERATORS}/constants.py": "6296e901d495ec6200dc3f68993ea13d8282e3c0dbe1a8c47967f111105d1fde",
    f"{GENERATORS}/niah.py": "e9cada0a7660d274fe73a1338a90a7087e17b630169f1aaf14a8d3221c6805b5",
    f"{GENERATORS}/variable_tracking.py": "9aac483420e158d116ab63fc43b9606bdb284ac0c053288c30776d5c365530e5",
    f"{GENERATORS}/common_words_extraction.py": "2671d4a84a383acef2d9e8f691a0bea4da03f1632ca3f4ad3c1de6d27ccbc6b9",
    f"{GENERATORS}/freq_words_extraction.py": "29b7af97ffdd2122fde348df20cd02add390a21cd6d64b6fd66c8663dc487f67",
    f"{GENERATORS}/qa.py": "f00c0b59cf8698e90831bbf461c2c4f40f2a30f2469534c27455808c717281d0",
    "scripts/synthetic.yaml": "34bc71dcacdc41a829a170f04b528fbf48d62c616338005ab4991680fbf8cb0b",
    "scripts/eval/synthetic/constants.py": "6740467c17b8dc06b6b30f4f97e54ce8de81db0dd879f1538d0b6b5727f4bd5f",
}
RUNS = ((42, 2048), (43, 6000))
SAID = [
    ("", ["7", "8"]),
    ("The numbers are 1234567, 7654321.", ["1234567", "7654321", "1111111", "2222222"]),
    ("BRAVE-OTTER and brave-otters", ["brave-otter", "Brave-Otters", "calm-otter"]),
    ("1. lamp 2. chair 3. Table", ["table", "chair", "lamp", "window", "door"]),
    ("in the year 1066.", ["1066", "the year 1066", "1067"]),
    ("none of them", ["Normandy"]),
]


def load(path: Path, name: str, arguments: dict[str, Any] | None = None) -> Any:
    """A script as a module, with these command-line arguments."""
    sys.argv = [path.name]
    for option, value in (arguments or {}).items():
        sys.argv += [f"--{option}", str(value)]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def stand_ins() -> None:
    tokenizer = types.SimpleNamespace(text_to_tokens=ruler_data.tokens)
    cut = re.compile(r"(?<=[.!?])\s+")
    for name, content in {
        "tokenizer": {"select_tokenizer": lambda kind, path: tokenizer},
        "manifest_utils": {"write_manifest": None},
        "nltk": {},
        "nltk.tokenize": {"sent_tokenize": lambda text: cut.split(text)},
    }.items():
        module = types.ModuleType(name)
        module.__dict__.update(content)
        sys.modules[name] = module


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@functools.lru_cache(maxsize=1)  # with all its pairs of words a module takes half a gigabyte
def script(path: Path, settings: str) -> Any:
    """A generator as a module, with its command line."""
    return load(path, "official", json.loads(settings))


def official(checkout: Path, config: dict[str, Any], task: dict[str, Any], seed: int, longest: int) -> Any:
    """The module that generates a kind."""
    settings = {
        "save_dir": ".", "save_name": "x", "tokenizer_path": "x", "max_seq_length": longest, "num_samples": 1,
        "tokens_to_generate": task["tokens_to_generate"], "random_seed": seed,
        "template": task["template"] + task["answer_prefix"], **config["args"],
    }  # fmt: skip
    if config["task"] == "niah":  # takes long to import, and looks at these two only later
        settings |= {"max_seq_length": 1, "random_seed": 0}
    module = script(checkout / GENERATORS / f"{config['task']}.py", json.dumps(settings))
    module.args.random_seed, module.args.max_seq_length = seed, longest
    return module


def generated(module: Any, kind: str, seed: int, longest: int) -> dict[str, Any]:
    """What one official run of one sample writes, and with how many sentences, words or documents."""
    used: dict[str, Any] = {}
    compose = getattr(module.generate_input_output, "__wrapped__", module.generate_input_output)

    @functools.wraps(compose)
    def from_the_seed(*positional: Any, **named: Any) -> Any:
        random.seed(seed)
        np.random.seed(seed)
        used["positional"], used["result"] = positional, compose(*positional, **named)
        return used["result"]

    module.generate_input_output = from_the_seed
    written: list[dict[str, Any]] = []
    module.write_manifest = lambda path, lines: written.extend(lines)
    module.main()
    (line,) = written
    size = used["result"][2] if kind == "freq_words_extraction" else used["positional"][kind == "qa"]
    return {
        "seed": seed, "longest": longest, "size": size, "length": line["length"], "input": digest(line["input"]),
        "answer_prefix": line["answer_prefix"], "outputs": line["outputs"],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("ruler.json"))
    given = parser.parse_args()
    for path, sha256 in SHA256.items():
        found = hashlib.sha256((given.checkout / path).read_bytes()).hexdigest()
        if found != sha256:
            raise SystemExit(f"{path} is not the expected one: sha256 is {found}, not {sha256}")
    stand_ins()
    with tempfile.TemporaryDirectory() as folder:
        checkout = Path(folder) / "RULER"
        shutil.copytree(given.checkout / "scripts", checkout / "scripts")
        ruler_data.write(checkout / GENERATORS / "json")
        sys.path.insert(0, str(checkout / GENERATORS))
        tasks = load(checkout / GENERATORS / "constants.py", "constants").TASKS
        kinds = yaml.safe_load((checkout / "scripts/synthetic.yaml").read_text())
        scorers = load(checkout / "scripts/eval/synthetic/constants.py", "scorers")
        golden: dict[str, Any] = {
            "source": "https://github.com/NVIDIA/RULER",
            "commit": COMMIT,
            "kinds": {
                name: {
                    "tokens_to_generate": tasks[config["task"]]["tokens_to_generate"],
                    "metric": scorers.TASKS[config["task"]]["metric_fn"].__name__,
                    "args": config["args"],
                    "runs": [
                        generated(official(checkout, config, tasks[config["task"]], *run), config["task"], *run)
                        for run in RUNS
                    ],
                }
                for name, config in kinds.items()
            },
            "scores": [
                {
                    "said": said, "references": references,
                    "string_match_all": scorers.string_match_all([said], [references]),
                    "string_match_part": scorers.string_match_part([said], [references]),
                }
                for said, references in SAID
            ],
        }  # fmt: skip
        first = kinds["niah_single_1"]
        pairs = official(checkout, first, tasks[first["task"]], *RUNS[0]).words
        golden["pairs"] = {"many": len(pairs), "at": {str(at): pairs[at] for at in range(0, len(pairs), 77_777)}}
    given.out.write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    main()
