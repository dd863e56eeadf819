"""What is asked of a plan: `--target "ms=20,users=8"`."""

from __future__ import annotations

from dataclasses import dataclass, fields

from fivefold.errors import InputError


@dataclass(frozen=True)
class Target:
    """ms: milliseconds of a decoding step, at most; tokens_s: tokens a second of all users, at least; users: at least;
    first_s: seconds until the first token, at most; kl: nats that a recipe may cost. None asks nothing."""

    ms: float | None = None
    tokens_s: float | None = None
    users: float | None = None
    first_s: float | None = None
    kl: float | None = None

    @classmethod
    def parse(cls, text: str) -> Target:
        """Raises `InputError`."""
        known = [part.name for part in fields(cls)]
        values: dict[str, float] = {}
        for part in text.split(","):
            name, sign, value = (piece.strip() for piece in part.partition("="))
            if not sign or name not in known:
                raise InputError(
                    f"--target {part.strip()!r} asks for nothing known: write {', '.join(known)} = a number."
                )
            try:
                number = float(value)
            except ValueError:
                raise InputError(f"--target {name}={value!r} is no number: write for example {name}=20.") from None
            if not 0 < number < float("inf"):
                raise InputError(f"--target {name}={value} is impossible: give a number above 0.")
            values[name] = number
        return cls(**values)

    def as_dict(self) -> dict[str, float | None]:
        return {part.name: getattr(self, part.name) for part in fields(self)}
