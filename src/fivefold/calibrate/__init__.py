"""What a method learns from a model beforehand, kept as a profile. `run.py` makes one (`fivefold calibrate`)."""

from fivefold.calibrate.learner import Capture, Learner
from fivefold.calibrate.profile import Profile, config_hash, load_profile, save_profile, signature

__all__ = ["Capture", "Learner", "Profile", "config_hash", "load_profile", "save_profile", "signature"]
