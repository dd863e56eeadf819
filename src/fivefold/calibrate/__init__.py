"""What a method learns from a model beforehand, kept as a profile."""

from fivefold.calibrate.profile import Profile, load_profile, save_profile, signature

__all__ = ["Profile", "load_profile", "save_profile", "signature"]
