"""The tables of docs/results.md, as Markdown, from what `fivefold eval --json` or `fivefold sweep --json` wrote.

python benchmarks/results_table.py results.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from fivefold.evaluate.summary import EXACT, FIDELITY
from fivefold.evaluate.tables import context_name, number


def main(file: str) -> None:
    result = json.loads(Path(file).read_text())
    for context in dict.fromkeys(entry["context"] for entry in result["ranking"]):
        ranking = [entry for entry in result["ranking"] if entry["context"] == context]
        cells = {(c["suite"], c["recipe"]): c for c in result["cells"] if c["context"] == context}
        print(f"### {context_name(context)}\n")
        print("| recipe | quality | bytes | step, ms | KL | top-1 | front |\n|---|---|---|---|---|---|---|")
        for entry in ranking:
            spread = "" if entry["low"] is None else f" ± {number(entry['high'] - entry['quality'])}"
            fidelity = cells.get((FIDELITY, entry["recipe"]), {})
            ends = [number(fidelity[end], 4) for end in ("kl_low", "kl_high") if end in fidelity]
            kl = number(entry["kl"], 4) + (f" ({' to '.join(ends)})" if ends else "")
            front = ", ".join(name for name in ("bytes", "time") if entry[f"{name}_front"])
            print(
                f"| `{entry['recipe']}` | {number(entry['quality'])}{spread} | {number(entry['ratio'], 3)} | "
                f"{number(entry['decode_ms'])} | {kl} | {number(entry['top1'], 3)} | {front} |"
            )
        suites = list(dict.fromkeys(suite for suite, _ in cells))
        print(f"\n| recipe | {' | '.join(suites)} |\n|---|{'---|' * len(suites)}")
        for entry in ranking:
            scores = [cells.get((suite, entry["recipe"])) for suite in suites]
            shown = [
                "–" if cell is None else number(cell["score"]) + (" (*)" if cell["exact_fails"] else "")
                for cell in scores
            ]
            print(f"| `{entry['recipe']}` | {' | '.join(shown)} |")
        chances = ["" if suite == FIDELITY else number(cells[suite, EXACT]["chance"]) for suite in suites]
        print(f"| chance | {' | '.join(chances)} |\n")


if __name__ == "__main__":
    main(sys.argv[1])
