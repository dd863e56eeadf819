"""The command line: `fivefold recipes | fetch | generate | chat | demo | eval | sweep | calibrate | plan | doctor |
bench | vllm-check`.

What a command is asked for goes to stdout; bars, reports and errors go to stderr. Every error raised on
purpose is one sentence and exit code 2; Ctrl-C is exit code 130. torch and transformers are imported inside
the commands, so that `fivefold --help` is quick.
"""

from fivefold.cli import bench, calibrate, chat, demo, evaluate, generate, machine, plan, recipes, vllm_check
from fivefold.cli.app import app as _app  # under its own name it would hide the module
from fivefold.cli.app import main

__all__ = ["main"]

# In the order of `fivefold --help`; no command knows of another.
_app.command()(recipes.recipes)
_app.command()(machine.fetch)
_app.command()(generate.generate)
_app.command()(chat.chat)
_app.command()(demo.demo)
_app.command()(machine.doctor)
_app.command(name="eval")(evaluate.evaluate)
_app.command()(evaluate.sweep)
_app.command()(calibrate.calibrate)
_app.command()(plan.plan)
_app.add_typer(bench.bench, name="bench")
_app.command(name="vllm-check")(vllm_check.vllm_check)
